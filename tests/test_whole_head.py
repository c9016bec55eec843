"""A read-out with all rows from the start: classes to come are learnt against and never asked for (law 7)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cl_moe import checkpoint, launch
from cl_moe.errors import InputError
from cl_moe.experiment import run_experiment
from cl_moe.growth.adapt import add_classes, apply
from cl_moe.models.base import Head
from cl_moe.models.rewind import RouterState
from cl_moe.run import Run
from cl_moe.scoring import Scoring
from cl_moe.strategies.teacher import Teacher
from tasks.peers_digits import peers_digits

SMALL = (
    *("experiment=peers_split_digits", "tracking=none", "stream.tune_on_first=3", "trainer.epochs=2"),
    *("model.width=32", "trainer.eval_batch_size=512"),
)


@pytest.fixture
def run(composed, tmp_path: Path, no_drawing: None) -> Run:
    return launch.build(composed(*SMALL, f"output_dir={tmp_path}"))


def test_classes_to_come_are_no_answer_and_never_right() -> None:
    scoring = Scoring(peers_digits())
    scoring.place(list(range(10)), torch.device("cpu"), arrived=4)
    logits = torch.zeros(5, 10)
    logits[:, 9] = 9.0  # a class that has not come outshouts all
    logits[[0, 1, 2, 3], [0, 1, 2, 0]] = 1.0
    targets = torch.tensor([0, 1, 2, 3, 9])
    right, count = scoring.score(logits, targets)
    assert (right.item(), int(count)) == (3.0, 5)
    found = scoring.calibration(logits, targets)
    assert found is not None
    assert found[1].tolist() == [True, True, True, False, False]
    torch.testing.assert_close(found[0], logits[:, :4].double().softmax(1).amax(1))
    changed = logits.clone()
    changed[:, 4:] = torch.randn(5, 6) * 100
    assert scoring.score(changed, targets)[0] == right, "what is said of them does not matter"
    scoring.place(list(range(10)), torch.device("cpu"), arrived=0)
    assert scoring.score(logits, targets)[0] == 0
    assert scoring.calibration(logits, targets) is None


def test_training_is_over_all_rows() -> None:
    scoring, logits, targets = Scoring(peers_digits()), torch.randn(6, 10), torch.arange(6) % 2
    scoring.place(list(range(10)), torch.device("cpu"), arrived=2)
    expected = torch.nn.functional.cross_entropy(logits, targets)
    torch.testing.assert_close(scoring.task_loss(logits, targets), expected, rtol=0, atol=0)


def test_rows_wait_for_their_classes() -> None:
    head = Head(4)
    head.grow([5, 3], ahead=True)
    head.grow([1, 0], ahead=True)
    rows = [cohort.weight.clone() for cohort in head.cohorts]
    assert (head.arrived, head.num_arrived_cohorts) == ([], 0)
    head.grow([5, 3])
    assert (head.arrived, head.ahead, head.num_arrived_cohorts) == ([5, 3], [1, 0], 1)
    assert all(torch.equal(a, b.weight) for a, b in zip(rows, head.cohorts, strict=True)), "nothing is drawn"
    with pytest.raises(ValueError, match="rows already"):
        head.grow([5])


def test_a_run_sees_what_has_come_and_nothing_else(run: Run) -> None:
    widths: list[tuple[int, int]] = []
    inner = run.learner.task_loss

    def noting(logits: Tensor, targets: Tensor) -> Tensor:
        widths.append((logits.shape[1], len(run.learner.model.head.arrived)))
        return inner(logits, targets)

    run.learner.task_loss = noting
    run_experiment(run)
    assert set(widths) == {(6, 2), (6, 4), (6, 6)}
    matrix = run.measured.matrix
    assert (matrix[0] == 0).all(), "nothing has come before any training"
    for i in range(3):
        assert (matrix[i, i:] == 0).all()
        assert matrix[i + 1, i] > 0.4, "what was just learnt"
    events = [(e["act"], e["classes"], e.get("ahead", False)) for e in run.learner.ledger]
    groups = [[0, 1], [2, 3], [4, 5]]
    assert events == [*(("head", g, True) for g in groups), *(("head", g, False) for g in groups)]


def test_teachers_and_rolled_back_routers_know_what_had_come(run: Run) -> None:
    model, teacher = run.learner.model, Teacher()
    for event in add_classes(model, run.stream.classes_at_start, 0, ahead=True)[:1]:
        apply(model, {**event, "ahead": False}, {})
    teacher.learn(model)
    then, inputs = RouterState.of(model), torch.rand(3, 64)
    whole = model(inputs)[0]
    assert torch.equal(teacher.logits(model, inputs, None), whole[:, :2])
    torch.testing.assert_close(then.logits(model, inputs), whole[:, :2])
    apply(model, {"act": "head", "classes": [2, 3]}, {})
    assert not then.is_of(model)


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_same_classes(run: Run, composed, tmp_path: Path) -> None:
    run_experiment(run)
    last = checkpoint.newest(tmp_path / "checkpoints")
    for path in (tmp_path / "checkpoints").glob("boundary_003*"):
        path.unlink()
    again = launch.build(composed(*SMALL, f"output_dir={tmp_path}"))
    run_experiment(again)
    assert torch.equal(again.measured.matrix, run.measured.matrix)
    state = checkpoint.newest(tmp_path / "checkpoints")
    assert all(torch.equal(v, last["learner"]["model"][n]) for n, v in state["learner"]["model"].items())


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(InputError, match=r"stream\.head"):
        replace(peers_digits(), head="wide")
