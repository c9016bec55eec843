"""A branch: a child run from a boundary of its parent, which is left as it was."""

from __future__ import annotations

import json
import runpy
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import Run

from cl_moe import checkpoint
from cl_moe.tracking import artifacts

CHAOS = runpy.run_path(str(Path(__file__).with_name("chaos.py")))
PARENT = (
    *("hydra.run.dir=out", "trainer.epochs=1", "stream.tune_on_first=4", "trainer.log_every=4"),
    *("layer=moe", "layer.hidden=8", "layer.num_experts=4", "model.width=16", "strategy=replay"),
    *("strategy.replay.memory_size=60", "optimizer=adamw", "optimizer.state=carry"),
)
GROWN = ("growth=at", "growth.events={2:4}")
BRANCH = ("branch=out@2", "hydra.run.dir=child")


pytestmark = pytest.mark.usefixtures("no_drawing")


@pytest.fixture(scope="module")
def parent(command_in: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a run of four experiences ended, in ``out``."""
    folder = tmp_path_factory.mktemp("parent")
    done = command_in(folder, *PARENT)
    assert done.status == 0, done.text
    return folder


@pytest.fixture
def here(parent: Path, tmp_path: Path) -> Path:
    """A copy of it. The store's artifacts stay where they are; no test reads them."""
    shutil.copytree(parent, tmp_path, dirs_exist_ok=True)
    return tmp_path


def run_of(folder: Path, store: Path | None = None) -> Run:
    client = MlflowClient(f"sqlite:///{store or folder.parent}/mlflow.db")
    return client.get_run((folder / "mlflow_run_id").read_text().strip())


def history(folder: Path) -> dict[str, list[tuple[int, float]]]:
    client, run = MlflowClient(f"sqlite:///{folder.parent}/mlflow.db"), run_of(folder)
    return {
        key: sorted((point.step, point.value) for point in client.get_metric_history(run.info.run_id, key))
        for key in run.data.metrics
    }


def rows(folder: Path) -> torch.Tensor:
    return artifacts.read_matrix(folder / artifacts.MATRIX).scores


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state = checkpoint.newest(folder / "checkpoints")
    assert state is not None
    return state["learner"]["model"]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same(one: Path, two: Path) -> None:
    for name in (artifacts.MATRIX, artifacts.LEDGER):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    mine, other = weights(one), weights(two)
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[key], other[key]) for key in mine)


@pytest.mark.parametrize("boundary", [0, 2])
def test_a_branch_with_nothing_changed_ends_as_its_parent(boundary: int, here: Path, command_in: Callable):
    done = command_in(here, f"branch=out@{boundary}", "hydra.run.dir=child")
    assert done.status == 0, done.text
    assert_same(here / "child", here / "out")


def test_experts_added_by_hand_in_mid_stream(here: Path, command_in: Callable):
    before = contents(here / "out"), run_of(here / "out").to_dictionary(), history(here / "out")
    done = command_in(here, *BRANCH, *GROWN)
    assert done.status == 0, done.text
    child, out = here / "child", here / "out"
    assert torch.equal(rows(child)[:3], rows(out)[:3])
    assert not torch.equal(rows(child)[3:], rows(out)[3:])
    acts = {folder: json.loads((folder / artifacts.LEDGER).read_text()) for folder in (child, out)}
    grown = [event for event in acts[child] if event["act"] == "grow"]
    assert {event["experience"] for event in grown} == {2}
    assert [event for event in acts[child] if event not in grown] == acts[out]
    assert (contents(out), run_of(out).to_dictionary(), history(out)) == before

    labels, run_id = run_of(child).data.tags, run_of(out).info.run_id
    assert (labels["branch"], labels["mlflow.parentRunId"]) == (f"{run_id}@2", run_id)
    params = run_of(child).data.params
    assert params["arm"].endswith(" branch@2")
    assert params["arm"].split(" branch@")[0] != run_of(out).data.params["arm"]
    curves = history(child)
    for j in range(4):
        curve = curves[f"accuracy/experience_{j:02d}"]
        assert curve == [(i, pytest.approx(score)) for i, score in enumerate(rows(child)[:, j].tolist())]
    assert [step for step, _ in curves["growth/num_experts"]] == [0, 1, 2, 3, 4]
    assert {"branch", "mlflow.parentRunId"}.isdisjoint(run_of(out).data.tags)


def test_a_strategy_that_is_new_in_the_child(here: Path, command_in: Callable):
    words = ("strategy=[replay,lwf]", "strategy.lwf.alpha=5", "strategy.replay.memory_size=40")
    done = command_in(here, *BRANCH, *words)
    assert done.status == 0, done.text
    assert torch.equal(rows(here / "child")[:3], rows(here / "out")[:3])
    assert not torch.equal(rows(here / "child")[3:], rows(here / "out")[3:])
    run = run_of(here / "child")
    assert run.data.tags["strategy"] == "replay+lwf"
    assert run.data.params["strategy.replay.memory_size"] == "40"


def test_a_branch_by_run_id_and_from_elsewhere(here: Path, command_in: Callable):
    elsewhere = here / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(here / "mlflow.db", elsewhere / "mlflow.db")
    MlflowClient(f"sqlite:///{elsewhere}/mlflow.db").set_tag(
        run_of(here / "out").info.run_id, "output_dir", str(here / "out")
    )
    run_id = run_of(here / "out").info.run_id
    done = command_in(elsewhere, f"branch={run_id}@3", "hydra.run.dir=child")
    assert done.status == 0, done.text
    assert_same(elsewhere / "child", here / "out")


@pytest.mark.slow
def test_children_of_a_sweep_and_their_children(here: Path, command_in: Callable):
    words = ("growth=at", "growth.events={2:4},{2:8}", "hydra.sweep.dir=sweep")
    done = command_in(here, "-m", "branch=out@2", *words)
    assert done.status == 0, done.text
    children = [run_of(here / "sweep" / number, here) for number in "01"]
    assert {run.data.tags["sweep"] for run in children} == {"sweep"}
    assert len({run.data.params["arm"] for run in children}) == 2
    for number in "01":
        assert torch.equal(rows(here / "sweep" / number)[:3], rows(here / "out")[:3])
    grandchild = command_in(here, "branch=sweep/1@3", "freeze=past_experts", "hydra.run.dir=child")
    assert grandchild.status == 0, grandchild.text
    assert run_of(here / "child").data.params["arm"].endswith(" branch@2 branch@3")
    assert torch.equal(rows(here / "child")[:4], rows(here / "sweep/1")[:4])


@pytest.mark.parametrize(
    ("place", "count"),
    [
        pytest.param("before saving", 1, marks=pytest.mark.slow),
        ("before training", 2),
        pytest.param("after saving", 2, marks=pytest.mark.slow),
    ],
)
def test_a_killed_child_goes_on_as_itself(
    place: str, count: int, here: Path, command_in: Callable, tmp_path_factory: pytest.TempPathFactory
):
    other = tmp_path_factory.mktemp("through")
    shutil.copytree(here, other, dirs_exist_ok=True)
    assert command_in(other, *BRANCH, *GROWN).status == 0
    process = CHAOS["start"](CHAOS["forkserver"](), here, (*BRANCH, *GROWN), place, count)
    process.join(120)
    assert process.exitcode == -signal.SIGKILL, (here / "log.txt").read_text()
    done = command_in(here, "resume=child")
    assert done.status == 0, done.text
    assert_same(here / "child", other / "child")
    walls = CHAOS["WALL_CLOCK"]
    mine, through = history(here / "child"), history(other / "child")
    assert mine.keys() == through.keys()
    assert {key for key in mine if mine[key] != through[key]} <= walls
    assert all([step for step, _ in mine[key]] == [step for step, _ in through[key]] for key in mine)


@pytest.mark.slow
def test_a_child_that_has_begun_needs_its_parent_no_more(here: Path, command_in: Callable):
    assert command_in(here, *BRANCH, *GROWN).status == 0
    before = contents(here / "child")[artifacts.MATRIX]
    shutil.rmtree(here / "out")
    (last,) = (here / "child/checkpoints").glob("boundary_004-*")
    last.unlink()
    done = command_in(here, "resume=child")
    assert done.status == 0, done.text
    assert "resumed after experience 3 of 4" in done.text
    assert contents(here / "child")[artifacts.MATRIX] == before


REFUSED: dict[tuple[str, ...], tuple[str, ...]] = {  # arguments: words of the message
    ("branch=out@7",): ("0, 1, 2, 3, 4", "change: branch (or checkpoint.keep of the parent)"),
    ("branch=out@2", "layer.num_experts=8"): (
        "layer.num_experts=8 in a branch of",
        "with 4",
        "change: layer.num_",
    ),
    ("branch=out@2", "layer=dense"): ("the parent's stream, model, layer", "change: layer."),
    ("branch=out@2", "router.k=1"): ("change: router.k",),
    ("branch=out@2", "model.width=8"): ("change: model.width",),
    ("branch=out@2", "seed.order=3"): ("seed.order=3 in a branch", "change: seed.order"),
    ("branch=out@2", "stream.tune_on_first=3"): ("change: stream.tune_on_first",),
    ("branch=nowhere@2",): ("got: branch=nowhere@2", "change: branch"),
    ("branch=out",): ("got: branch=out\n", "<whole number>", "change: branch"),
    ("branch=out@2", "resume=out"): ("beside resume=out", "change: branch (or resume)"),
    ("-m", "branch=out@1,out@2"): ("got: branch=out@1,out@2", "one value", "change: branch"),
    ("branch=out@2", "output_dir=out"): ("branch=", "change: branch"),
    ("branch=out@2", "growth=at", "growth.events={9:4}"): ("change: growth.events",),
}


@pytest.mark.parametrize("arguments", REFUSED, ids=" ".join)
def test_a_wrong_branch_is_one_message(arguments: tuple[str, ...], parent: Path, command_in: Callable):
    before = contents(parent / "out")
    done = command_in(parent, *arguments)
    assert done.status == 2, done.text
    for words in (*REFUSED[arguments], "got: ", "allowed: "):
        assert words in done.text
    assert done.text.count("got: ") == 1
    assert contents(parent / "out") == before
    assert not (parent / "outputs").exists()


def test_the_seed_of_the_data_may_change_where_the_stream_does_not(command_in: Callable, tmp_path: Path):
    words = ("tracking=none", "trainer.epochs=1", "stream.tune_on_first=2", "model.width=16")
    assert command_in(tmp_path, *words, "hydra.run.dir=split").status == 0
    done = command_in(tmp_path, "branch=split@1", "seed.data=1", "seed.init=1", "hydra.run.dir=child")
    assert done.status == 0, done.text
    permuted = ("stream=permuted_digits", *words, "hydra.run.dir=permuted")
    assert command_in(tmp_path, *permuted).status == 0
    done = command_in(tmp_path, "branch=permuted@1", "seed.data=1")
    assert done.status == 2
    assert "is of another stream, or of other data" in done.text
    assert "change: branch" in done.text


def test_a_parent_whose_stored_stream_would_call_something_else_is_refused(here: Path, command_in: Callable):
    stored = here / "out/config.yaml"
    text = stored.read_text()
    stored.write_text(text.replace("tasks.split_digits.split_digits", "pandas.read_pickle"))
    assert stored.read_text() != text
    done = command_in(here, "branch=out@2", "seed.data=1")
    assert done.status == 2
    assert "change: stream._target_" in done.text
