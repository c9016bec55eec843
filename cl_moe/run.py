"""The state of one run: where it stands in its stream, what it has measured, and what is saved of it."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L  # noqa: N812
from torch.utils.data import DataLoader

from cl_moe import agreement, checkpoint, ending, leaving, preflight, rank_state, stopping
from cl_moe.agreement import check_alike, from_first, is_first, share_values
from cl_moe.anytime import Anytime
from cl_moe.batches import training_loader
from cl_moe.checkpoint import Branch, Checkpoints, Moment
from cl_moe.cost import CostMeter
from cl_moe.evaluation import Evaluation, enter
from cl_moe.growth import FreezePolicy, GrowthSchedule, NeverPrune, PrunePolicy, Trace
from cl_moe.growth.adapt import add_classes
from cl_moe.growth.checks import check_growth, check_prune
from cl_moe.learner import Learner
from cl_moe.measuring import Measuring, Past
from cl_moe.memory import keep_freed
from cl_moe.progress import StreamProgress
from cl_moe.spending import Budget, Spending
from cl_moe.starting import start_from
from cl_moe.stream import Experience, Stream
from cl_moe.tracking import names, table
from cl_moe.tracking.loads import keep_row
from cl_moe.tracking.record import Record
from cl_moe.tracking.tracker import Tracker
from cl_moe.trainer import TrainerSpec
from cl_moe.upcycling import Upcycled
from cl_moe.watchdog import Watchdog

log = logging.getLogger(__name__)


@dataclass
class Run:
    """Everything one experiment needs, and what it has measured so far.

    Args:
        stream: as evaluated; training sees ``training_stream``, the strategies' view of it.
        learner: fresh; ``resume`` brings it to where an earlier process stopped.
        growth: when experts are born.
        freeze: what stops learning.
        spec: how long and on what to train.
        tracker: where the numbers go.
        folder: of this run: checkpoints, artifacts, the lock.
        seed_init: newborns are drawn from it.
        seed_data: orders of batches are drawn from it.
        objective: metric key whose last value the experiment returns.
        prune: what ends.
        checkpoints: when to save inside an experience, and what is kept.
        measuring: what is measured beside the accuracy matrix.
        budget: what may be spent.
        branch: the parent's boundary that this run starts from, instead of from nothing.
        upcycled: what this run's mixture takes over from that parent, if it was a dense model.
        go_on: what ``resume=`` is to name after a stop, a sweep's folder say; None: the run's own.
        name: shown in MLflow.
        params: flattened configuration, and the arm.
        tags: what the run is found by.
    """

    stream: Stream
    learner: Learner
    growth: GrowthSchedule
    freeze: FreezePolicy
    spec: TrainerSpec
    tracker: Tracker
    folder: Path
    seed_init: int = 0
    seed_data: int = 0
    objective: str = "stream/average_accuracy"
    prune: PrunePolicy = field(default_factory=NeverPrune)
    checkpoints: Checkpoints = field(default_factory=Checkpoints)
    measuring: Measuring = field(default_factory=Measuring)
    budget: Budget = field(default_factory=Budget)
    branch: Branch | None = None
    upcycled: Upcycled | None = None
    go_on: Path | None = None
    name: str = "run"
    params: Mapping[str, object] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.growth.check(self.stream.horizon)
        check_growth(self.learner.model, self.growth, self.stream.horizon, self.stream.classes_by_then)
        preflight.check_fit(self.stream, self.learner.model, self.spec.epochs, self.learner.strategies)
        preflight.check_objective(self.objective, self.stream, self.learner, self.measuring)
        self.training_stream = preflight.training_view(self.stream, self.learner.strategies)
        preflight.check_learning(self.stream, self.training_stream, self.growth, self.freeze)
        self.fingerprint = preflight.fingerprint(self.stream, self.learner)
        experiences = self.training_stream
        steps = self.spec.num_steps(experiences)
        self.progress = StreamProgress([e.name for e in experiences], steps, mute=not is_first())
        if self.spec.engine is not None and self.spec.num_ranks > 1:
            rows, flops = self.learner.optimizer_spec.rows, self.budget.bounds["flops"]
            self.spec.engine.check(self.learner.model, self.learner.strategies, rows, self.stream.open, flops)
        self.trainer: L.Trainer = self.spec.build()
        keep_freed(whole=not agreement.in_pieces())
        self.spending = Spending(self.learner, self.budget, self.trainer)
        self.spending.check_start(experiences, self.growth, self.spec)
        self.measured = Record(self.stream.kind, [experience.name for experience in self.stream])
        self.past = Past()
        self.cost = CostMeter(self.learner, self.past)
        self.saved: Moment | None = None  # newest on the disk
        self.inside = False  # the model was adapted to the experience after the last row, and may be training
        self.trained = False  # it was trained on it, and its row is not measured yet
        self.watchdog = Watchdog(self.spec.stall_minutes)
        size = self.spec.eval_batch_size
        self.anytime = Anytime(self.learner, self.stream, self.measuring, size, self.watchdog.alive)
        check_prune(self.learner.model, self.prune)
        self.learner.trace = Trace(self.growth.looks | self.freeze.looks | self.prune.looks)
        self.learner.note, self.learner.tick = self.tracker.add, self._tick
        self.learner.epochs = self.spec.epochs
        self.learner.between_steps, self.learner.between_tests = self._between_steps, self._between_tests

    @property
    def boundary(self) -> int:
        """Experiences trained and measured so far; -1 before the row of the untrained model."""
        return len(self.measured.rows) - 1

    @property
    def newest(self) -> Experience | None:
        """The experience that was trained last; None before the first."""
        return self.stream[self.boundary] if self.boundary >= 0 else None

    @cached_property
    def saved_in(self) -> Path:
        """Folder of the checkpoints."""
        return self.folder / "checkpoints"

    @contextmanager
    def open(self) -> Iterator[None]:
        """Hold the folder, open the tracker and the progress bar; close them as the run ends."""
        with ending.one_writer(self.folder) if is_first() else nullcontext(), self.progress, self.watchdog:
            if is_first():
                leaving.write_start(self)  # whether or not MLflow answers
            self.tracker.start(self.folder, self.name, self.params, self.tags, self.go_on)
            self.cost.start([*self.stream, *self.training_stream])
            with ending.told(self):
                yield

    def resume(self) -> None:
        """Go to where an earlier process, or the parent of a branch, stopped; else stay at the start.

        A fresh learner gets the head rows that the scenario gives away at the start.
        """
        state = from_first(lambda: checkpoint.newest(self.saved_in, self.refuse))
        if state is not None:
            self.load(state)
            self.tracker.load_state_dict(state["tracker"])
            if is_first():
                leaving.tell_start(self.tracker, self.folder, anew=False)
                leaving.tell_arrived(self)
            self.tracker.send()
            self.tracker.tag("failure", "none")  # whatever ended the earlier process does not hold any more
            self.saved = Moment(state["boundary"], state["batches"])
            self.say_where("resumed")
            return
        self.tracker.load_state_dict(None)
        if is_first():
            leaving.tell_start(self.tracker, self.folder, anew=True)
        self.measured.cumulative = self.measuring.matrix
        if self.branch is not None:
            start_from(self, self.branch)
        else:
            learner = self.learner
            groups, ahead = self.stream.classes_at_start, self.stream.scenario == "class"
            learner.ledger += add_classes(learner.model, groups, self.seed_init, ahead)
        share_values(self.learner.model)

    def is_due(self, experience: Experience) -> bool:
        """Whether to train on it: joint training leaves nothing for later ones, and a budget may be spent."""
        untrained = len(experience.train) > 0 and not self.trained
        return untrained and (self.inside or self.spending.affords(experience.index))

    @contextmanager
    def fitting(self, experience: Experience) -> Iterator[DataLoader]:
        """Training batches of an experience, in an order of its own, from where the run stands in it."""
        if not self.inside:
            self.spec.raise_epochs(self.trainer)
        loader = training_loader(experience.train, self.spec.batch_size, self.seed_data, experience.index)
        assert self.trainer.fit_loop.max_epochs is not None
        epoch, skip = divmod(self.learner.batches if self.inside else 0, len(loader))
        # Said here, since Lightning draws the first pass after a restart before it sets the epoch.
        loader.sampler.begin_at(  # type: ignore[attr-defined]
            self.trainer.fit_loop.max_epochs - self.spec.epochs + epoch, skip
        )
        self.inside, self.learner.experience = True, experience
        with self.cost.training(experience, self.spec.epochs):
            yield loader
        check_alike(self.learner.model, f"after training on {experience.name}")
        self.inside, self.trained = False, True

    def close_boundary(self, evaluation: Evaluation) -> None:
        """Record a row, save a checkpoint that holds the unsent points, then send them."""
        measured, boundary = self.measured, len(self.measured.rows)
        enter(measured, evaluation, self.past, self.measuring, self.learner, self.trainer.global_step)
        if is_first():
            keep_row(measured, self.folder)
        self.tracker.add(names.all_points(measured, boundary), boundary)
        if (
            boundary == 0 or measured.steps[-1] > measured.steps[-2]
        ):  # joint training stands still after its start
            self.tracker.add(self.cost.points(), self.trainer.global_step)
        self.trained = False
        self.save(Moment(boundary))
        self.progress.say(table.boundary_line(measured, boundary))

    def finish(self) -> float:
        """Write artifacts and figures, print the table, return the objective."""
        leaving.tell_cut(self.spending.cuts, self.tracker, self.progress.say)
        leaving.tell_decisions(self.learner.ledger, self.progress.say)
        costs = self.cost.points()  # the figures are drawn after the run, and are no part of its peak
        for path, place in leaving.left_by(self, self.progress.say) if is_first() else ():
            self.tracker.artifact(path, place)
        self.progress.say("")
        self.progress.console.print(table.run_table(self.measured, costs))
        self.progress.say(f"written to {self.folder}")
        return from_first(lambda: names.objective(self.measured, self.objective, costs))

    def _tick(self) -> None:
        self.progress.tick()
        self.watchdog.alive()

    def _between_tests(self) -> None:
        """Nothing of a run changes in an evaluation, so it may be saved and end there at any time."""
        self.watchdog.alive()
        wished = agreement.most(stopping.wish())
        if self.trained and wished:
            self.save(Moment(self.boundary, self.learner.batches))
        stopping.obey(wished)

    def _between_steps(self) -> None:
        """Between two optimizer steps a run may look at its past experiences, be saved, and stop."""
        step = self.trainer.global_step
        self.spending.check(self.boundary, self.learner.batches)
        self.tracker.add(self.anytime.points(self.measured, step), step)
        due = stopping.SAVE if self.checkpoints.due() else 0
        wished = agreement.most(max(due, stopping.wish()))
        if wished:
            self.save(Moment(self.boundary, self.learner.batches))
        stopping.obey(wished)

    def save(self, moment: Moment) -> None:
        """Write a checkpoint that holds the unsent points, then send them."""
        self.watchdog.alive()
        best = int(self.measured.matrix.nanmean(dim=1).nan_to_num(-math.inf).argmax())
        state = rank_state.with_all(self._state())
        if is_first():
            self.checkpoints.save(self.saved_in, moment, state, best)
        self.checkpoints.began_anew()
        self.saved = moment
        self.tracker.send()

    def _state(self) -> dict[str, Any]:
        return {
            "fingerprint": self.fingerprint,
            "learner": self.learner.whole_state(self.inside),
            "trained": self.trained,
            "loop": self.trainer.fit_loop.state_dict(),
            "max_epochs": self.trainer.fit_loop.max_epochs,
            "record": self.measured.state_dict(),
            "past": self.past.state_dict(),
            "cost": self.cost.state_dict(self.trained),
            "tracker": self.tracker.state_dict(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go to where a checkpoint was written."""
        state = rank_state.own_of(state)
        self.learner.load_whole_state(state["learner"], self.trainer.precision_plugin.convert_module)
        self.trainer.fit_loop.load_state_dict(state["loop"])
        self.trainer.fit_loop.max_epochs = state["max_epochs"]
        names = [experience.name for experience in self.stream]
        self.measured = Record.from_state_dict(state["record"]).stretched(names)
        self.measured.cumulative = self.measuring.matrix
        self.past.load_state_dict(state["past"])
        self.cost.load_state_dict(state["cost"])
        self.trained = state["trained"]
        self.inside = state["batches"] > 0 and not self.trained
        self.learner.batches = state["batches"]

    def refuse(self, state: Mapping[str, Any]) -> str | None:
        """Why a state is not this run's, if it is not."""
        return preflight.why_not(state, self.fingerprint, self.upcycled is not None, self.stream.open)

    def say_where(self, verb: str) -> None:
        """Say where the run goes on from."""
        assert self.saved is not None
        self.progress.say(f"{verb} {ending.where(self.saved, len(self.stream))}")
