"""A budget refuses or cuts: up front, between two steps, at a boundary; and after a restart just so."""

from __future__ import annotations

import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from omegaconf import DictConfig

from cl_moe import checkpoint, launch
from cl_moe.checkpoint import Checkpoints
from cl_moe.errors import InputError, RunFailedError
from cl_moe.experiment import run_experiment
from cl_moe.leaving import tell_cut, tell_decisions
from cl_moe.run import Run
from cl_moe.spending import Budget

SMALL = (
    *("tracking=none", "stream.tune_on_first=3", "trainer.epochs=2", "trainer.batch_size=64"),
    *("model.width=16", "layer=moe", "layer.hidden=8", "layer.num_experts=4", "growth=every_experience"),
    *("growth.num_experts=2", "strategy=replay", "eval.decomposition=never", "checkpoint.every_steps=1"),
)
differences = runpy.run_path(str(Path(__file__).with_name("chaos.py")))["differences"]
pytestmark = pytest.mark.usefixtures("no_drawing")


@pytest.fixture
def build(composed: Callable[..., DictConfig], tmp_path: Path) -> Callable[..., Run]:
    def built(name: str, *words: str) -> Run:
        return launch.build(composed(*SMALL, *words, f"output_dir={tmp_path / name}"))

    return built


@pytest.fixture
def spent(build: Callable[..., Run]) -> tuple[int, int]:
    """Operations of a whole run, and of its first two experiences."""
    run = build("whole")
    run_experiment(run)
    assert "cut" not in {event["act"] for event in run.learner.ledger}
    states = [checkpoint.at(checkpoint.Branch(run.folder, i), lambda state: None) for i in (2, 3)]
    two, three = (state["cost"]["charges"]["flops"]["train"] for state in states)
    return three, two


def final(folder: Path) -> dict[str, Any]:
    state = checkpoint.newest(folder / "checkpoints")
    assert state is not None
    del state["cost"]["clock"]
    return state


def test_a_cut_ends_training_and_not_the_run(build, spent, monkeypatch, tmp_path) -> None:
    whole, two = spent
    bound = (whole + two) // 2  # in the midst of the third experience
    words = (f"budget.flops={bound}", "budget.on_exceed=cut")
    copies, original = list[Path](), Checkpoints.save

    def copying(self: Checkpoints, folder: Path, *rest: Any) -> Path:
        written = original(self, folder, *rest)
        copies.append(Path(shutil.copy(written, tmp_path)))
        return written

    run = build("cut", *words)
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", copying)
        run_experiment(run)
    (event,) = [event for event in run.learner.ledger if event["act"] == "cut"]
    assert (event["experience"], event["budget"], event["bound"]) == (2, "flops", bound)
    assert bound <= event["spent"] == run.learner.charges.flops["train"] < whole
    assert 0 < event["batches"] < run.spec.num_steps(run.training_stream)[2]
    assert len(run.measured.rows) == len(run.stream) + 1
    inside = [copy for copy in copies if copy.name.startswith("boundary_002_batch")]
    assert len(inside) == event["batches"]
    for copy in (inside[0], inside[-1]):  # the last one was written with the cut in it
        folder = tmp_path / copy.stem
        (folder / "checkpoints").mkdir(parents=True)
        shutil.copy(copy, folder / "checkpoints")
        run_experiment(build(copy.stem, *words))
        assert differences(final(folder), final(run.folder)) == []


@pytest.mark.slow
def test_what_was_spent_at_a_boundary_trains_and_grows_no_more(build, spent) -> None:
    run = build("boundary", f"budget.flops={spent[1]}", "budget.on_exceed=cut")
    run_experiment(run)
    acts = [(event["experience"], event["act"]) for event in run.learner.ledger]
    assert acts[-1] == (2, "cut")
    assert acts.count((2, "grow")) == 0
    assert run.measured.steps[3] == run.measured.steps[2]
    assert len(run.measured.rows) == 4


def test_a_branch_with_a_larger_budget_goes_on(build, spent) -> None:
    parent = build("parent", f"budget.flops={spent[1] // 2}", "budget.on_exceed=cut")
    run_experiment(parent)
    assert parent.measured.steps[3] == parent.measured.steps[2]
    words = (f"branch={parent.folder}@2", "budget.on_exceed=cut")
    for name, bound, trains in (("more", 10 * spent[0], True), ("as much", spent[1] // 2, False)):
        child = build(name, *words, f"budget.flops={bound}")
        run_experiment(child)
        assert (child.measured.steps[3] > child.measured.steps[2]) == trains
        assert bool(child.spending.cuts) != trains


@pytest.mark.slow
def test_a_refusing_budget_fails_where_it_could_not_be_known(build, spent) -> None:
    with pytest.raises(RunFailedError, match=r"budget.flops=.* is reached .*(.|\n)*kept: the state after"):
        run_experiment(build("refusing", f"budget.flops={spent[0] - 1}"))
    run_experiment(build("enough", f"budget.flops={spent[0] + 1}"))


def test_memories_count_as_bytes(build) -> None:
    with pytest.raises(RunFailedError, match=r"budget\.bytes"):
        run_experiment(build("memory", "budget.bytes=30000"))
    run = build("cut memory", "budget.bytes=30000", "budget.on_exceed=cut")
    run_experiment(run)
    (event,) = [event for event in run.learner.ledger if event["act"] == "cut"]
    assert event["spent"] >= 30000


@pytest.mark.parametrize(
    ("words", "key", "said"),
    [
        (("budget.flops=1e4",), "budget.flops", "forward passes alone"),
        (("budget.bytes=1000",), "budget.bytes", "weights alone"),
        (("budget.bytes=1000", "budget.on_exceed=cut"), "budget.bytes", "weights alone"),
    ],
)
def test_what_is_sure_is_refused_before_any_training(words, key, said, build) -> None:
    with pytest.raises(InputError, match=said) as caught:
        build("refused", *words)
    assert caught.value.key == key


@pytest.mark.parametrize("options", [{"flops": 0}, {"bytes": -1}, {"flops": True}, {"on_exceed": "stop"}])
def test_bounds_are_numbers_above_zero(options) -> None:
    with pytest.raises(InputError) as caught:
        Budget(**options)
    assert caught.value.key == f"budget.{next(iter(options))}"


@pytest.mark.parametrize(
    ("batches", "place"),
    [(0, "before experience 3"), (1, "1 batch into experience 3"), (2, "2 batches into experience 3")],
)
def test_a_cut_is_told_where_it_fell(batches, place) -> None:
    said, tracker = list[str](), Mock()
    event = {"experience": 2, "batches": batches, "budget": "bytes", "bound": 30000}
    tell_cut([event], tracker, said.append)
    told = f"cut {place}: budget.bytes=30000 was reached"
    assert said == [f"training was {told}; what came after was measured, not trained"]
    tracker.tag.assert_called_once_with("budget", told)


def test_what_a_schedule_decided_is_summed_up() -> None:
    ledger = [
        {"experience": 1, "act": "decide", "wanted": 2, "born": 2},
        {"experience": 1, "act": "grow", "num_experts": 2},
        {"experience": 2, "act": "decide", "wanted": 0, "born": 0},
    ]
    said = list[str]()
    tell_decisions(ledger, said.append)
    full = {"experience": 3, "act": "decide", "wanted": 2, "born": 0, "over_budget": "experts"}
    tell_decisions([*ledger, full], said.append)
    tell_decisions(ledger[1:2], said.append)
    assert said == [
        "growth was asked for at 1 of 2 boundaries, and came at 1; the figures are in ledger.json",
        "growth was asked for at 2 of 3 boundaries, and came at 1: growth.budget.experts left no room for "
        "more; the figures are in ledger.json",
    ]
