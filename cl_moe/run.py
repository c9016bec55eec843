"""The state of one run, and what happens at its boundaries: record, save, send, finish."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import lightning as L  # noqa: N812
import torch
from filelock import FileLock, Timeout
from torch.utils.data import DataLoader

from cl_moe import checkpoint
from cl_moe.batches import training_loader
from cl_moe.cost import CostMeter
from cl_moe.errors import InputError, RunFailedError, StopRequestedError
from cl_moe.evaluation import Evaluation
from cl_moe.growth import Census, FreezePolicy, GrowthSchedule
from cl_moe.growth.adapt import add_classes, births, check_growth, take_census
from cl_moe.layers.routing import ExpertLoad
from cl_moe.learner import Learner
from cl_moe.progress import StreamProgress
from cl_moe.strategies import Strategy
from cl_moe.stream import Experience, Stream
from cl_moe.tracking import artifacts, figures, names, table
from cl_moe.tracking.record import Record
from cl_moe.tracking.tracker import Tracker
from cl_moe.trainer import TrainerSpec

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
        keep_checkpoints: newest boundaries kept.
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
    keep_checkpoints: int = 2
    name: str = "run"
    params: Mapping[str, object] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        checkpoint.check_keep(self.keep_checkpoints)
        self.growth.check(len(self.stream))
        check_growth(self.learner.model, self.growth)
        self.training_stream = training_view(self.stream, self.learner.strategies)
        experiences = self.training_stream
        self.progress = StreamProgress([e.name for e in experiences], self.spec.num_steps(experiences))
        self.trainer: L.Trainer = self.spec.build()
        self.cost = CostMeter()
        self.saved: int | None = None  # number of the newest boundary on the disk
        self.measured = Record(self.stream.kind, [experience.name for experience in self.stream])
        self._check_objective()
        self._check_learning()
        self.learner.note, self.learner.tick = self.tracker.add, self.progress.tick

    @cached_property
    def checkpoints(self) -> Path:
        """Folder of the boundaries' checkpoints."""
        return self.folder / "checkpoints"

    @contextmanager
    def open(self) -> Iterator[None]:
        """Hold the folder, open the tracker and the progress bar; close them as the run ends."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = FileLock(self.folder / ".lock").acquire(blocking=False)
        except Timeout:
            raise InputError(
                got=f"{self.folder}, which another process is writing to",
                allowed="one live writer per run folder",
                key="resume (or output_dir)",
            ) from None
        with lock, self.progress:
            self.tracker.start(self.folder, self.name, self.params, self.tags)
            try:
                yield
            except OSError as error:  # the disk is full, say; what was saved before is whole
                failure = RunFailedError(f"{type(error).__name__}: {error}")
                self._fail(failure)
                raise failure from error
            except BaseException as error:
                self._fail(error)
                if isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt):
                    raise error.__context__ from None  # Lightning exits by itself when the user stops a fit
                raise
            self.tracker.finish("finished")

    def resume(self) -> int | None:
        """Load the newest good boundary, if there is one, and return its number; None to start over.

        A fresh learner gets the head rows that the scenario gives away at the start.
        """
        state = checkpoint.newest(self.checkpoints)
        if state is None:
            learner = self.learner
            learner.ledger += add_classes(learner.model, self.stream.classes_at_start, self.seed_init)
            return None
        self.learner.load_whole_state(state["learner"])
        self.trainer.fit_loop.load_state_dict(state["loop"])
        self.trainer.fit_loop.max_epochs = state["max_epochs"]
        self.measured = Record.from_state_dict(state["record"])
        self.cost.load_state_dict(state["cost"])
        self.tracker.load_state_dict(state["tracker"])
        self.tracker.send()
        self.tracker.tag("failure", "none")  # whatever ended the earlier process does not hold any more
        boundary = self.saved = int(state["boundary"])
        self.progress.say(f"resumed after experience {boundary} of {len(self.stream)}")
        return boundary

    def census(self, experience: Experience) -> Census:
        """What schedule and policy may see: shapes, ages, loads and scores of the past."""
        index = experience.index
        loads = {}
        if index > 0:
            for block, per_experience in self.measured.loads[-1].items():
                loads[block] = torch.stack([load.score for load in per_experience[:index]]).sum(0)
        scores = [self.measured.rows[i][:i].mean().item() for i in range(1, index + 1)]
        return take_census(self.learner.model, index, self.learner.ledger, loads, scores)

    def loader(self, experience: Experience) -> DataLoader:
        """Training batches of an experience, in an order of its own."""
        loader = training_loader(experience.train, self.spec.batch_size, self.seed_data, experience.index)
        # After a restart Lightning draws the first pass before it sets the epoch, in a longer run after it.
        loader.sampler.set_epoch(self.trainer.current_epoch)  # type: ignore[attr-defined]
        return loader

    def record_shock(self, after: Evaluation) -> None:
        """Note how the mean score on the experiences seen jumped when the model grew."""
        seen = len(after.row)
        before = self.measured.rows[-1][:seen].mean()
        shock = (after.row.mean() - before).item()
        self.measured.shocks[seen] = shock
        self.tracker.add({"growth/shock": shock}, seen)

    def close_boundary(self, evaluation: Evaluation) -> int:
        """Record a row, save a checkpoint that holds the unsent points, then send them."""
        measured, model = self.measured, self.learner.model
        boundary = len(measured.rows)
        measured.rows.append(evaluation.row)
        measured.loads.append(evaluation.loads)
        measured.ledger = self.learner.ledger
        measured.steps.append(self.trainer.global_step)
        measured.cohorts.append(
            {
                block: list(
                    zip(layer.cohort_sizes, births(measured.ledger, block), layer.frozen_cohorts, strict=True)
                )
                for block, layer in model.expert_layers.items()
            }
        )
        points = names.stream_points(measured, boundary) | names.expert_points(measured, boundary)
        self.tracker.add(points, boundary)
        if (
            boundary == 0 or measured.steps[-1] > measured.steps[-2]
        ):  # joint training stands still after its start
            self.tracker.add(self.cost.points(self.learner), self.trainer.global_step)
        checkpoint.save(self.checkpoints, boundary, self._state(), self.keep_checkpoints)
        self.saved = boundary
        self.tracker.send()
        self.progress.say(table.boundary_line(measured, boundary))
        return boundary

    def finish(self) -> float:
        """Write artifacts and figures, print the table, return the objective."""
        written = artifacts.write_artifacts(self.measured, self.folder)
        written += figures.write_figures(self.measured, self.folder)
        for path in [*written, self.folder / "config.yaml"]:
            if path.exists():
                self.tracker.artifact(path)
        self.progress.say("")
        self.progress.console.print(table.run_table(self.measured, self.cost.points(self.learner)))
        self.progress.say(f"written to {self.folder}")
        return names.objective(self.measured, self.objective, self.cost.points(self.learner))

    def _check_objective(self) -> None:
        """Refuse, before any training, an objective that the end of this run will not define."""
        num, blocks = len(self.stream), self.learner.model.expert_layers.items()
        sizes = {block: sum(layer.cohort_sizes) for block, layer in blocks}
        loads = {
            block: [ExpertLoad(torch.ones(size).double(), torch.ones(size).long(), torch.tensor(size))] * num
            for block, size in sizes.items()
        }
        ended = Record(
            self.stream.kind,
            self.measured.names,
            rows=[torch.zeros(num, dtype=torch.float64)] * (num + 1),
            loads=[loads] * (num + 1),
            cohorts=[{block: [(size, 0, False)] for block, size in sizes.items()}] * (num + 1),
        )
        costs = {**self.cost.points(self.learner), "cost/tokens_per_second": 1.0}
        names.objective(ended, self.objective, costs)

    def _check_learning(self) -> None:
        """Refuse, before any training, a policy that leaves nothing to learn where nothing is ever born."""
        if (
            self.growth.sizes
            and len(self.stream) > 1
            and not any(len(e.train) for e in self.training_stream[1:])
        ):
            raise InputError(
                got=f"growth, and strategy={'+'.join(self.learner.strategies)}, which trains before it only",
                allowed="growth=never beside joint training",
                key="growth (or strategy)",
            )
        seen: set[int] = {label for group in self.stream.classes_at_start for label in group}
        for experience in self.training_stream:
            census = Census(experience.index, {})
            newborns = self.growth.newborns(census)
            stop = self.freeze.decide(census, newborns)
            born = newborns or {*experience.classes} - seen
            if stop.everything and not born and len(experience.train):
                raise InputError(
                    got=f"nothing left to learn in experience {experience.index}",
                    allowed="growth, or new classes in every experience, beside freeze=all_past",
                    key="freeze (or growth)",
                )
            seen.update(experience.classes)

    def _state(self) -> dict[str, object]:
        return {
            "learner": self.learner.whole_state(),
            "loop": self.trainer.fit_loop.state_dict(),
            "max_epochs": self.trainer.fit_loop.max_epochs,
            "record": self.measured.state_dict(),
            "cost": self.cost.state_dict(),
            "tracker": self.tracker.state_dict(),
        }

    def _fail(self, error: BaseException) -> None:
        stopped = isinstance(error, KeyboardInterrupt | SystemExit | StopRequestedError)
        self.tracker.tag("failure", f"{type(error).__name__} at step {self.trainer.global_step}: {error}")
        self.tracker.finish("stopped" if stopped else "failed")
        kept = "nothing"
        if self.saved is not None:
            kept = f"the state after experience {self.saved} in {self.checkpoints}"
        go_on = f"kept: {kept}\ngo on: cl-moe resume={self.folder}"
        if isinstance(error, RunFailedError):
            error.args = (
                f"{error}\n{go_on} when the cause is mended; other settings need a run of their own",
            )
        elif isinstance(error, StopRequestedError):
            error.args = (f"stopped on request\n{go_on}",)


def training_view(stream: Stream, strategies: Mapping[str, Strategy]) -> Stream:
    """The stream as the strategies let training see it; at most one of them may change it."""
    changing = [name for name, s in strategies.items() if type(s).view is not Strategy.view]
    if len(changing) > 1:
        raise InputError(
            got=f"strategy=[{','.join(strategies)}]",
            allowed=f"one of {', '.join(changing)}: each decides which data is trained on",
            key="strategy",
        )
    return strategies[changing[0]].view(stream) if changing else stream
