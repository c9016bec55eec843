"""How a branch starts: from a boundary of its parent."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import lightning as L  # noqa: N812

from cl_moe import checkpoint, preflight
from cl_moe.agreement import from_first, is_first
from cl_moe.checkpoint import Branch, Moment
from cl_moe.cost import CostMeter
from cl_moe.learner import Learner
from cl_moe.measuring import Past
from cl_moe.progress import StreamProgress
from cl_moe.rank_state import own_of
from cl_moe.stream import Stream
from cl_moe.tracking import inside, names
from cl_moe.tracking.loads import copy_rows
from cl_moe.tracking.record import Record
from cl_moe.tracking.tracker import Tracker
from cl_moe.upcycling import Upcycled


class Run(Protocol):
    """What is started."""

    learner: Learner
    trainer: L.Trainer
    tracker: Tracker
    training_stream: Stream
    folder: Path
    measured: Record
    past: Past
    cost: CostMeter
    progress: StreamProgress
    upcycled: Upcycled | None

    def refuse(self, state: Mapping[str, Any]) -> str | None:
        """Why a state is not this run's, if it is not."""

    def load(self, state: Mapping[str, Any]) -> None:
        """Go to where a checkpoint was written."""

    def save(self, moment: Moment) -> None:
        """Write a checkpoint."""

    def say_where(self, verb: str) -> None:
        """Say where the run goes on from."""


def start_from(run: Run, branch: Branch) -> None:
    """Take over a parent's boundary; a strategy new here is shown the past, as if it had been there."""
    state = own_of(from_first(lambda: checkpoint.at(branch, run.refuse)))
    preflight.check_something_left(run.training_stream, branch.boundary)
    if run.upcycled is not None:
        state = run.upcycled.take_over(state)
    run.load(state)
    run.cost.load_state_dict(state["cost"], same_run=False)
    if run.upcycled is not None:
        run.past.forget()  # what the dense parent chose by is no part of the mixture
    if is_first():
        copy_rows(branch.folder, run.folder, branch.boundary)
    run.learner.place_classes()  # a strategy may ask for the loss on the past
    for name, strategy in run.learner.strategies.items():
        if name not in state["learner"]["strategies"]:
            for experience in run.training_stream[: branch.boundary]:
                run.learner.experience = experience
                with run.learner.charges.counting(strategy.computes):
                    strategy.end(run.learner.outlook())
    for i in range(branch.boundary + 1):
        run.tracker.add(names.all_points(run.measured, i), i)
    for step, points in inside.anytime_points(run.measured):
        run.tracker.add(points, step)
    run.tracker.add(run.cost.points(), run.trainer.global_step)
    run.save(Moment(branch.boundary))
    run.say_where("branched off")
    if run.upcycled is not None and not run.upcycled.exact:
        run.progress.say("what the model computes changes as it becomes sparse: see growth/shock")
    run.upcycled = None  # it holds a model's weights
