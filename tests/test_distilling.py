"""``cl-moe distill=...``: a dense student of a sparse run, through the command line."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import Run

from cl_moe import checkpoint
from cl_moe.checkpoint import Branch
from cl_moe.learner import Learner
from cl_moe.tracking import artifacts

TEACHER = (
    *("hydra.run.dir=sparse", "trainer.epochs=1", "stream.tune_on_first=2", "trainer.log_every=4"),
    *("layer=moe", "layer.hidden=8", "layer.num_experts=4", "model.width=16", "growth=every_experience"),
    *("freeze=past_experts", "strategy=replay", "strategy.replay.memory_size=60", "arm=sparse"),
)
STUDENT = ("distill=sparse", "hydra.run.dir=dense", "optimizer.momentum=0.9")


pytestmark = pytest.mark.usefixtures("no_drawing")


@pytest.fixture(scope="module")
def taught(command_in: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a sparse run ended, in ``sparse``, and a dense student of it, in ``dense``."""
    folder = tmp_path_factory.mktemp("taught")
    for words in (TEACHER, STUDENT):
        done = command_in(folder, *words)
        assert done.status == 0, done.text
    return folder


def weights(folder: Path, boundary: int) -> dict[str, torch.Tensor]:
    return checkpoint.at(Branch(folder, boundary), lambda state: None)["learner"]["model"]


def run_of(folder: Path) -> Run:
    client = MlflowClient(f"sqlite:///{folder.parent}/mlflow.db")
    return client.get_run((folder / "mlflow_run_id").read_text().strip())


def test_the_student_begins_with_the_teachers_weights_outside_the_experts(taught: Path):
    theirs, mine = weights(taught / "sparse", 2), weights(taught / "dense", 0)
    assert set(mine) == {"stem.weight", "stem.bias", "blocks.0.linear_in.weight", "blocks.0.linear_in.bias"}
    for name in ("stem.weight", "stem.bias"):
        assert torch.equal(mine[name], theirs[name])
        assert not torch.equal(weights(taught / "dense", 2)[name], theirs[name]), "and learns on"


def test_it_is_another_arm_linked_to_its_teacher_with_its_cost(taught: Path):
    teacher, student = run_of(taught / "sparse"), run_of(taught / "dense")
    run_id = teacher.info.run_id
    assert student.data.tags["teacher"] == f"{run_id}@2"
    assert student.data.tags["mlflow.parentRunId"] == run_id
    assert "branch" not in student.data.tags
    arm = student.data.params["arm"]
    assert arm.startswith("dense distill_from ")
    assert "optimizer.momentum=0.9" in arm
    assert "distill=" not in arm, "seeds of a teacher are no other arm"
    sizes = [run.data.metrics["cost/params_total"] for run in (teacher, student)]
    assert student.data.metrics["cost/compression"] == pytest.approx(sizes[0] / sizes[1])
    assert student.data.metrics["cost/compression"] > 1
    assert "train/distill_soft" in student.data.metrics
    assert "cost/compression" not in teacher.data.metrics


@pytest.mark.parametrize(
    "count", [pytest.param(3, marks=pytest.mark.slow), 14]
)  # in the first experience, and in the second
def test_a_student_cut_off_ends_with_the_same_bits(
    count: int, taught: Path, tmp_path: Path, command_in: Callable, monkeypatch: pytest.MonkeyPatch
):
    shutil.copytree(taught, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "dense")
    step, calls = Learner.training_step, []

    def failing(*args: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) == count:
            raise RuntimeError("a power cut")
        return step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "training_step", failing)
        assert command_in(tmp_path, *STUDENT, "checkpoint.every_steps=2").status == 1
    done = command_in(tmp_path, "resume=dense")
    assert done.status == 0, done.text
    assert "resumed" in done.text
    one, other = weights(tmp_path / "dense", 2), weights(taught / "dense", 2)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    matrices = [(folder / "dense" / artifacts.MATRIX).read_bytes() for folder in (tmp_path, taught)]
    assert matrices[0] == matrices[1]


def test_what_is_given_stands_above_the_teachers(taught: Path, command_in: Callable):
    words = ("distill=sparse@1", "strategy=[joint,distill_from]", "layer=moe", "layer.num_experts=2")
    done = command_in(taught, *words, "hydra.run.dir=other", "tracking=none")
    assert done.status == 0, done.text
    stored = (taught / "other" / "command.yaml").read_text()
    assert "- layer=moe\n- layer.num_experts=2\n" in stored
    assert "sparse@1" in stored
    assert not [
        word for word in ("memory_size", "every_experience", "past_experts", "arm=") if word in stored
    ]


def test_a_branch_of_a_student_has_its_teacher(taught: Path, command_in: Callable):
    done = command_in(taught, "branch=dense@1", "hydra.run.dir=child", "tracking=none", "optimizer.lr=0.05")
    assert done.status == 0, done.text
    assert "sparse@2" in (taught / "child" / "config.yaml").read_text()


REFUSED: dict[tuple[str, ...], tuple[str, ...]] = {  # arguments: words of the message
    ("distill=sparse@7",): ("0, 1, 2", "change: distill"),
    ("distill=nowhere",): ("got: distill=nowhere", "change: distill"),
    ("distill=sparse", "strategy=naive"): ("nobody to listen", "change: strategy"),
    ("strategy=distill_from",): ("without a teacher", "change: distill"),
    ("distill=sparse", "branch=sparse@1"): ("beside distill=sparse", "change: distill (or branch)"),
    ("distill=sparse", "stream=permuted_digits", "stream.tune_on_first=null"): ("change: distill",),
    ("distill=sparse", "growth=every_experience"): ("growth of a model without experts", "change: layer"),
}


@pytest.mark.parametrize("arguments", REFUSED, ids=" ".join)
def test_a_wrong_command_is_one_message(arguments: tuple[str, ...], taught: Path, command_in: Callable):
    done = command_in(taught, *arguments)
    assert done.status == 2, done.text
    for words in (*REFUSED[arguments], "got: ", "allowed: "):
        assert words in done.text
    assert done.text.count("got: ") == 1


def test_a_teacher_whose_configuration_would_call_something_else_is_refused(
    taught: Path, tmp_path: Path, command_in: Callable
):
    shutil.copytree(taught, tmp_path, dirs_exist_ok=True)
    stored = tmp_path / "sparse/config.yaml"
    stored.write_text(stored.read_text().replace("cl_moe.models.MLPClassifier", "pandas.read_pickle"))
    done = command_in(tmp_path, "distill=sparse")
    assert done.status == 2
    assert "change: model._target_" in done.text
