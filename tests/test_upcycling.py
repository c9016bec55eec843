"""``cl-moe branch=<dense run>@2 upcycle=true layer=moe``: a dense run goes on as a mixture of its copies."""

from __future__ import annotations

import json
import runpy
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from mlflow import MlflowClient

from cl_moe import checkpoint, distilling
from cl_moe.checkpoint import Branch
from cl_moe.seeds import seeded
from cl_moe.stream import Stream
from cl_moe.tracking import artifacts

CHAOS = runpy.run_path(str(Path(__file__).with_name("chaos.py")))
PARENT = (
    *("hydra.run.dir=out", "stream=permuted_digits", "stream.num_experiences=4", "trainer.epochs=1"),
    *("layer.hidden=8", "model.width=16", "trainer.log_every=4", "optimizer=adamw", "optimizer.state=carry"),
    *("optimizer.lr=0.01", "strategy=[replay,lwf]", "strategy.replay.memory_size=60"),
)
MIXTURE = ("branch=out@2", "upcycle=true", "layer=moe", "layer.hidden=8", "layer.num_experts=3")
GROWN = ("growth=at", "growth.events={3:2}", "freeze=past_experts", "checkpoint.every_steps=5")
CHILD = (*MIXTURE, *GROWN, "hydra.run.dir=child")


pytestmark = pytest.mark.usefixtures("no_drawing")


@pytest.fixture(scope="module")
def family(command_in: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a dense run ended, in ``out``, and a mixture that goes on from it, in ``child``."""
    folder = tmp_path_factory.mktemp("family")
    assert (done := command_in(folder, *PARENT)).status == 0, done.text
    before = contents(folder / "out"), history(folder / "out")
    assert (done := command_in(folder, *CHILD)).status == 0, done.text
    assert "becomes sparse" not in done.text
    assert (contents(folder / "out"), history(folder / "out")) == before, "the parent is left as it was"
    return folder


@pytest.fixture
def here(family: Path, tmp_path: Path) -> Path:
    """A copy of the parent alone."""
    shutil.copytree(family / "out", tmp_path / "out")
    shutil.copy(family / "mlflow.db", tmp_path / "mlflow.db")
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def history(folder: Path) -> dict[str, list[tuple[int, float]]]:
    client = MlflowClient(f"sqlite:///{folder.parent}/mlflow.db")
    run = client.get_run((folder / "mlflow_run_id").read_text().strip())
    return {
        key: sorted((point.step, point.value) for point in client.get_metric_history(run.info.run_id, key))
        for key in run.data.metrics
    }


def rows(folder: Path) -> torch.Tensor:
    return artifacts.read_matrix(folder / artifacts.MATRIX).scores


def ledger(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / artifacts.LEDGER).read_text())


def state(folder: Path, boundary: int) -> dict[str, Any]:
    return checkpoint.at(Branch(folder, boundary), lambda state: None)["learner"]


def stream_of(composed: Callable) -> Stream:
    return instantiate(composed(*PARENT[1:]).stream)


def accuracies(folder: Path, boundary: int, stream: Stream) -> np.ndarray:
    """Accuracy on each experience of the model saved at a boundary, counted here."""
    model, _ = distilling.load_model(Branch(folder, boundary), stream)
    model.eval()
    found = []
    for experience in stream:
        inputs, targets = experience.test.tensors
        with torch.no_grad():
            column = model(inputs)[0].numpy().argmax(axis=1)
        found.append((np.array(model.head.classes)[column] == targets.numpy()).mean())
    return np.array(found)


def test_it_computes_at_first_what_its_parent_did(family: Path, composed: Callable):
    stream = stream_of(composed)
    dense, _ = distilling.load_model(Branch(family / "out", 2), stream)
    mixture, events = distilling.load_model(Branch(family / "child", 2), stream)
    inputs = stream[0].test.tensors[0].double()
    with torch.no_grad():
        old, new = (model.double().eval()(inputs)[0] for model in (dense, mixture))
    assert torch.allclose(old, new, rtol=1e-5, atol=1e-6)
    assert np.allclose(accuracies(family / "child", 2, stream), rows(family / "out")[2].numpy())
    (event,) = [event for event in events if event["act"] == "upcycle"]
    assert event == {
        **{"experience": 2, "act": "upcycle", "layer": 0, "num_experts": 3, "noise": 0.0, "exact": True}
    }
    assert history(family / "child")["growth/shock"][0] == (2, pytest.approx(0.0, abs=1e-9))


def test_every_weight_is_where_it_belongs(family: Path, composed: Callable):
    dense, mixture = (state(family / name, 2) for name in ("out", "child"))
    theirs, mine = dense["model"], mixture["model"]
    pool = "blocks.0.cohorts.0."
    assert {name for name in mine if not name.startswith(pool)} == {
        name for name in theirs if not name.startswith("blocks.0.")
    }
    for name in mine:
        if not name.startswith(pool):
            assert torch.equal(mine[name], theirs[name])
    for ours, linear in (("in", "linear_in"), ("out", "linear_out")):
        for expert in range(3):
            assert torch.equal(mine[f"{pool}w_{ours}"][expert], theirs[f"blocks.0.{linear}.weight"].t())
            assert torch.equal(mine[f"{pool}b_{ours}"][expert], theirs[f"blocks.0.{linear}.bias"])
    config = composed(*PARENT[1:], *MIXTURE[2:])
    with seeded(config.seed.init, "init"):
        fresh = instantiate(config.model)(input_shape=(64,), num_classes=10)
    assert torch.equal(mine[f"{pool}key"], fresh.state_dict()[f"{pool}key"]), "the router's keys are new"
    names = {name for name in dense["optimizer"] if not name.startswith("model.blocks.0.")}
    assert {*mixture["optimizer"]} == names
    assert names < {*dense["optimizer"]}
    for name in names:
        assert torch.equal(mixture["optimizer"][name]["exp_avg"], dense["optimizer"][name]["exp_avg"])


def test_a_memory_is_kept_and_an_old_model_is_learnt_anew(family: Path):
    dense, mixture = (state(family / name, 2) for name in ("out", "child"))
    replay, teacher = mixture["strategies"]["replay"], mixture["strategies"]["lwf"]
    assert str(replay) == str(dense["strategies"]["replay"])
    assert "blocks.0.linear_in.weight" in dense["strategies"]["lwf"]["values"]
    assert teacher["values"].keys() == mixture["model"].keys()
    assert all(torch.equal(teacher["values"][name], mixture["model"][name]) for name in teacher["values"])
    assert sorted(teacher["trained"]) == list(range(10))


def test_it_goes_on_as_any_mixture_and_its_curves_are_whole(family: Path):
    child, out = family / "child", family / "out"
    assert torch.equal(rows(child)[:3], rows(out)[:3])
    assert not torch.equal(rows(child)[3:], rows(out)[3:])
    first, last = state(child, 2)["model"], state(child, 4)["model"]
    at_growth = state(child, 3)["model"]
    pool = "blocks.0.cohorts.0."
    assert not torch.equal(first[f"{pool}w_in"], at_growth[f"{pool}w_in"]), "copies learn"
    assert not torch.equal(at_growth[f"{pool}w_in"][0], at_growth[f"{pool}w_in"][1]), "and part"
    frozen = [name for name in at_growth if name.startswith(pool)]
    assert frozen
    assert all(torch.equal(at_growth[name], last[name]) for name in frozen)
    assert last["blocks.0.cohorts.1.w_in"].shape[0] == 2
    curves = history(child)
    for j in range(4):
        scores = enumerate(rows(child)[:, j].tolist())
        assert curves[f"accuracy/experience_{j:02d}"] == [(i, pytest.approx(score)) for i, score in scores]
    assert curves["growth/num_experts"] == [(3, 3.0), (4, 5.0)]
    assert [step for step, _ in curves["growth/shock"]] == [2, 3]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "count"),
    [
        ("before saving", 1),
        pytest.param("before evaluating", 3, marks=pytest.mark.slow),
        ("after training", 9),
        pytest.param("after saving", 3, marks=pytest.mark.slow),
    ],
)
def test_killed_and_resumed_it_ends_the_same(
    place: str, count: int, here: Path, family: Path, command_in: Callable
):
    process = CHAOS["start"](CHAOS["forkserver"](), here, CHILD, place, count)
    process.join(120)
    assert process.exitcode == -signal.SIGKILL, (here / "log.txt").read_text()
    if place != "before saving":
        shutil.rmtree(here / "out")  # a child that has begun needs its parent no more
    done = command_in(here, "resume=child")
    assert done.status == 0, done.text
    for name in (artifacts.MATRIX, artifacts.LEDGER):
        assert (here / "child" / name).read_bytes() == (family / "child" / name).read_bytes()
    mine, through = state(here / "child", 4)["model"], state(family / "child", 4)["model"]
    assert mine.keys() == through.keys()
    assert all(torch.equal(mine[name], through[name]) for name in mine)
    walls = ("seconds", "eval_seconds", "diagnostics_seconds", "tokens_per_second", "peak_memory_bytes")
    points, others = history(here / "child"), history(family / "child")
    assert points.keys() == others.keys()
    assert {key for key in points if points[key] != others[key]} <= {f"cost/{name}" for name in walls}
    assert all([step for step, _ in points[key]] == [step for step, _ in others[key]] for key in points)


@pytest.mark.slow
@pytest.mark.parametrize("boundary", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_branch_of_the_branch(boundary: int, family: Path, command_in: Callable):
    words = (f"branch=child@{boundary}", f"hydra.run.dir=grandchild{boundary}", "optimizer.lr=0.02")
    done = command_in(family, *words)
    assert done.status == 0, done.text
    grandchild = family / f"grandchild{boundary}"
    assert torch.equal(rows(grandchild)[: boundary + 1], rows(family / "child")[: boundary + 1])
    assert not torch.equal(rows(grandchild), rows(family / "child"))
    assert ledger(grandchild) == ledger(family / "child")
    assert "upcycle: false" in (grandchild / "config.yaml").read_text()
    assert [step for step, _ in history(grandchild)["growth/shock"]] == [2, 3]


@pytest.mark.slow
def test_a_student_of_the_branch(family: Path, command_in: Callable):
    done = command_in(family, "distill=child", "layer.hidden=8", "hydra.run.dir=dense", "tracking=none")
    assert done.status == 0, done.text
    student, teacher = state(family / "dense", 0)["model"], state(family / "child", 4)["model"]
    assert torch.equal(student["stem.weight"], teacher["stem.weight"])
    assert "blocks.0.linear_out.weight" in student


@pytest.mark.slow
def test_a_language_model_goes_on_without_a_jump(command: Callable, tmp_path: Path):
    text = (
        *("stream=text_domains", "stream.domains=[novels_en,python_code]", "stream.train_bytes=4000"),
        *("stream.test_bytes=2000", "stream.context=32", "model.width=16", "model.num_heads=2"),
        *("model.num_blocks=2", "model.slots=every_other"),
    )
    done = command(*text, "layer.hidden=8", "layer.activation=gelu", "hydra.run.dir=out")
    assert done.status == 0, done.text
    same = ("layer=moe", "layer.hidden=8", "layer.activation=gelu", "layer.num_experts=2")
    done = command("branch=out@1", "upcycle=true", *same, "hydra.run.dir=child")
    assert done.status == 0, done.text
    layers = [event["layer"] for event in ledger(tmp_path / "child") if event["act"] == "upcycle"]
    assert layers == [1]
    ((at, jump),) = history(tmp_path / "child")["growth/shock"]
    assert at == 1
    assert abs(jump) < 1e-5, "nats"
    assert torch.equal(rows(tmp_path / "child")[:2], rows(tmp_path / "out")[:2])


@pytest.mark.slow
def test_gates_that_do_not_sum_to_1_change_the_function_and_it_says_by_how_much(
    family: Path, command_in: Callable, composed: Callable
):
    done = command_in(family, *MIXTURE, "router=switch", "upcycle_noise=0.05", "hydra.run.dir=switch")
    assert done.status == 0, done.text
    assert done.text.count("what the model computes changes as it becomes sparse") == 1
    (event,) = [event for event in ledger(family / "switch") if event["act"] == "upcycle"]
    assert (event["exact"], event["noise"]) == (False, 0.05)
    after = accuracies(family / "switch", 2, stream_of(composed))[:2].mean()
    before = rows(family / "out")[2, :2].mean().item()
    (jump,) = history(family / "switch")["growth/shock"]
    assert jump == (2, pytest.approx(after - before))
    assert jump[1] != 0
    copies = state(family / "switch", 2)["model"]["blocks.0.cohorts.0.w_in"]
    assert not torch.equal(copies[0], copies[1])


REFUSED: dict[tuple[str, ...], tuple[str, ...]] = {  # arguments: words of the message
    ("branch=out@2", "layer=moe"): ("or upcycle=true for layer=moe", "change: layer._target_"),
    (*MIXTURE, "layer.hidden=16"): ("hidden=8 and dim=16", "change: layer.hidden"),
    (*MIXTURE, "layer.activation=gelu"): ("change: layer.activation",),
    (*MIXTURE, "layer.bias=false"): ("layer with biases into experts without", "change: layer.bias"),
    (*MIXTURE, "model.width=8"): ("change: model.width",),
    ("branch=out@2", "upcycle=true", "layer=peer"): ("into PEER", "change: layer (or upcycle)"),
    ("branch=out@2", "upcycle=true", "layer=pkm"): ("into PKM", "change: layer (or upcycle)"),
    ("branch=out@2", "upcycle=true"): ("into a dense layer", "change: layer (or upcycle"),
    ("branch=child@2", "upcycle=true"): ("of a run with experts", "or upcycle=false", "change: layer"),
    ("upcycle=true", "layer=moe"): ("upcycle=true without a branch", "change: branch (or upcycle)"),
    (*MIXTURE, "upcycle=3"): ("got: upcycle=3", "change: upcycle\n"),
    (*MIXTURE, "upcycle_noise=-1"): ("a number >= 0", "change: upcycle_noise"),
    ("upcycle_noise=.1",): ("upcycle=true beside it", "change: upcycle_noise"),
    (*MIXTURE[1:], "branch=out@4"): ("nothing left to train on", "change: branch"),
}


@pytest.mark.parametrize("arguments", REFUSED, ids=" ".join)
def test_a_wrong_command_is_one_message(arguments: tuple[str, ...], family: Path, command_in: Callable):
    before = contents(family / "out")
    done = command_in(family, *arguments)
    assert done.status == 2, done.text
    for words in (*REFUSED[arguments], "got: ", "allowed: "):
        assert words in done.text
    assert done.text.count("got: ") == 1
    assert contents(family / "out") == before
