"""``cl-moe reproduce=...``: the same numbers to the last bit, or where they differ; by the command line."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from cl_moe.learner import Learner
from cl_moe.tracking import artifacts
from cl_moe.tracking.provenance import DATA, DIFF, ENVIRONMENT

WORDS = (
    *("trainer.epochs=1", "stream.tune_on_first=2", "model.width=16", "layer=moe", "layer.num_experts=4"),
    *(
        "layer.hidden=8",
        "growth=every_experience",
        "freeze=past_experts",
        "trainer.log_every=4",
        "seed.init=3",
    ),
)


pytestmark = pytest.mark.usefixtures("no_drawing")


@pytest.fixture(scope="module")
def ended(command_in: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder in which a run ended, in ``one``."""
    folder = tmp_path_factory.mktemp("ended")
    done = command_in(folder, *WORDS, "hydra.run.dir=one", "tracking.uri=sqlite:///mlflow.db")
    assert done.status == 0, done.text
    return folder


@pytest.fixture
def here(ended: Path, tmp_path: Path) -> Path:
    """A copy of its own; the store's artifacts stay where they are."""
    shutil.copytree(ended, tmp_path, dirs_exist_ok=True)
    return tmp_path


def id_of(folder: Path) -> str:
    return (folder / "mlflow_run_id").read_text().strip()


def run_of(folder: Path) -> Run:
    return MlflowClient(f"sqlite:///{folder.parent}/mlflow.db").get_run(id_of(folder))


def test_a_run_made_again_has_the_same_numbers(here: Path, command_in: Callable):
    done = command_in(here, "reproduce=one", "hydra.run.dir=two")
    assert done.status == 0, done.text
    assert "same configuration, versions, code and data" in done.text
    assert f"accuracy matrix and all points of {id_of(here / 'one')}, to the last bit" in done.text
    matrices = [(here / name / artifacts.MATRIX).read_bytes() for name in ("one", "two")]
    assert matrices[0] == matrices[1]
    one, two = run_of(here / "one"), run_of(here / "two")
    assert two.data.tags["reproduces"] == one.info.run_id
    assert two.data.tags["reproduced"] == "equal"
    assert two.data.params["arm"] == one.data.params["arm"]
    assert "reproduces" not in one.data.tags
    again = command_in(here, "reproduce=two", "hydra.run.dir=three", "tracking=none")
    assert again.status == 0, "a reproduction can be reproduced, and without MLflow its matrix is compared"
    assert "accuracy matrix of" in again.text


@pytest.mark.slow
def test_by_run_id_from_another_folder(here: Path, tmp_path_factory: pytest.TempPathFactory, command_in):
    uri, other = f"tracking.uri=sqlite:///{here}/mlflow.db", tmp_path_factory.mktemp("other")
    done = command_in(other, f"reproduce={id_of(here / 'one')}", uri, "hydra.run.dir=two")
    assert done.status == 0, done.text
    assert "to the last bit" in done.text


def test_without_its_folder_from_what_mlflow_has(here: Path, ended: Path, command_in: Callable):
    run_id = id_of(here / "one")
    shutil.rmtree(here / "one")
    MlflowClient(f"sqlite:///{here}/mlflow.db").set_tag(run_id, "output_dir", str(here / "one"))
    done = command_in(here, f"reproduce={run_id}", "hydra.run.dir=two")
    assert done.status == 0, done.text
    assert f"accuracy matrix and all points of {run_id}, to the last bit" in done.text
    assert run_of(here / "two").data.tags["reproduces"] == run_id


def test_what_differs_is_said_before_and_where_the_numbers_differ_after(here: Path, command_in: Callable):
    one = here / "one"
    matrix = one / artifacts.MATRIX
    lines = matrix.read_text().splitlines()
    cells = lines[2].split(",")
    cells[1] = repr(float(cells[1]) - 2**-40)
    matrix.write_text("\n".join([*lines[:2], ",".join(cells), *lines[3:]]) + "\n")
    text = (one / ENVIRONMENT).read_text()
    (one / ENVIRONMENT).write_text(text.replace("numpy==", "numpy==0.").replace("threads 1", "threads 64"))
    (one / DIFF).write_text("- another\n")
    data = (one / DATA).read_text().replace("digits 2-3", "digits 9-9")
    (one / DATA).write_text(data)
    stored = (one / "config.yaml").read_text()
    (one / "config.yaml").write_text(stored.replace("log_every: 4", "log_every: 5"))
    done = command_in(here, "reproduce=one", "hydra.run.dir=two")
    assert done.status == 1
    before, _, after = done.text.partition("before training")
    for words in (
        *(
            "numpy was 0.",
            "threads was 64, is 1",
            "uncommitted changes are others",
            "trainer.log_every was 5",
        ),
        *("data of the experience digits 2-3 are others", "data of the experience digits 9-9 are not there"),
    ):
        assert words in before
    assert "not reproduced: 1 numbers" in after
    assert f"R[1, digits 0-1]: {cells[1]}, now " in after
    assert "(+9.09e-13)" in after
    assert after.count("numpy was") == 1
    assert run_of(here / "two").data.tags["reproduced"] == "different"
    assert run_of(here / "two").info.status == "FINISHED", "the run itself is whole"


def test_a_point_that_is_another_is_found(here: Path, command_in: Callable):
    outbox = here / "one" / "outbox.jsonl"
    text = outbox.read_text()
    outbox.write_text(text.replace('"metric": "train/loss"', '"metric": "train/lost"', 1))
    done = command_in(here, "reproduce=one", "hydra.run.dir=two")
    assert done.status == 1
    assert "train/lost at 0" in done.text
    assert "now not there" in done.text


@pytest.mark.slow
def test_a_reproduction_that_was_cut_off_goes_on(here: Path, command_in: Callable):
    step, calls = Learner.training_step, []

    def failing(*args: object):
        calls.append(1)
        if len(calls) == 9:
            raise RuntimeError("a power cut")
        return step(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "training_step", failing)
        assert command_in(here, "reproduce=one", "hydra.run.dir=two").status == 1
    done = command_in(here, "resume=two")
    assert done.status == 0, done.text
    assert "resumed" in done.text
    assert "to the last bit" in done.text


REFUSED: dict[tuple[str, ...], tuple[str, ...]] = {  # arguments: words of the message
    ("reproduce=nowhere",): ("nowhere", "change: reproduce"),
    ("reproduce=one", "optimizer.lr=1"): ("got: optimizer.lr=1 beside reproduce", "change: optimizer.lr"),
    ("reproduce=one", "-m"): ("got: -m beside reproduce",),
    ("reproduce=one", "branch=one@1"): ("branch=one@1 beside reproduce", "change: branch"),
    ("reproduce=one", "seed.init=1"): ("beside it output_dir", "change: seed.init"),
    ("reproduce=empty",): ("got: reproduce=empty", "change: reproduce"),
    ("reproduce=",): ("change: reproduce",),
    ("reproduce=unfinished",): ("has left no accuracy_matrix.csv", "change: reproduce"),
}


@pytest.mark.parametrize("arguments", REFUSED, ids=" ".join)
def test_a_wrong_command_is_one_message(arguments: tuple[str, ...], here: Path, command_in: Callable):
    (here / "empty").mkdir()
    shutil.copytree(here / "one", here / "unfinished")
    (here / "unfinished" / artifacts.MATRIX).unlink()
    done = command_in(here, *arguments)
    assert done.status == 2, done.text
    for words in (*REFUSED[arguments], "got: ", "allowed: "):
        assert words in done.text
    assert done.text.count("got: ") == 1
