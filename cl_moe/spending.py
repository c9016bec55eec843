"""What a run may spend: training operations and bytes held; a run that would spend more is refused or cut."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import lightning as L  # noqa: N812
import torch

from cl_moe.anytime import untouched
from cl_moe.counting import CountFlops
from cl_moe.errors import InputError, RunFailedError
from cl_moe.growth import GrowthSchedule
from cl_moe.growth.budget import sizes_after
from cl_moe.learner import Learner
from cl_moe.memory import optimizer_bytes, readable
from cl_moe.stream import Stream
from cl_moe.trainer import TrainerSpec

Exceeding = Literal["refuse", "cut"]


class Budget:
    """The ``budget`` node: the same money for every arm.

    Args:
        flops: training operations in all, as ``cost/train_flops`` counts them: backward passes, teachers,
            replayed examples and growth included; None: any number.
        bytes: held at once by weights, optimizer and strategies (memories, teachers): ``cost/param_bytes``,
            ``cost/optimizer_bytes`` and ``cost/buffer_bytes``; None: any number.
        on_exceed: ``"refuse"``: a run that cannot stay within is refused before any training where that can
            be known, and fails when it happens where it cannot; ``"cut"``: training ends with the step that
            reaches the budget; what is left of the stream is measured, not trained, and the ledger says so.

    Raises:
        InputError: a bound that is no number above 0.
    """

    def __init__(
        self, flops: float | None = None, bytes: int | None = None, on_exceed: Exceeding = "refuse"
    ) -> None:
        self.bounds = {"flops": flops, "bytes": bytes}
        for name, bound in self.bounds.items():
            number = isinstance(bound, int | float) and not isinstance(bound, bool) and 0 < bound < math.inf
            if bound is not None and not number:
                raise InputError(
                    got=f"{name}={bound!r}", allowed="a number above 0, or null", key=f"budget.{name}"
                )
        if on_exceed not in get_args(Exceeding):
            raise InputError(got=f"on_exceed={on_exceed!r}", allowed="refuse or cut", key="budget.on_exceed")
        self.on_exceed = on_exceed

    @property
    def bounded(self) -> bool:
        """Whether anything may be too much."""
        return any(bound is not None for bound in self.bounds.values())


class Spending(L.Callback):
    """Holds a run's spending against its budget, between two optimizer steps and before each experience.

    A cut is an event of the ledger, so a run that was killed after it goes on as one that was cut.

    Args:
        learner: whose charges, model and strategies are looked at.
        budget: what may be spent.
        trainer: of the stream, for its optimizers; told to stop at a cut.
    """

    def __init__(self, learner: Learner, budget: Budget, trainer: L.Trainer) -> None:
        self.learner, self.budget, self.trainer = learner, budget, trainer
        if budget.bounded:  # Lightning asks a callback seven times a step
            trainer.callbacks.append(self)  # type: ignore[attr-defined]

    def check_start(self, training: Stream, growth: GrowthSchedule, spec: TrainerSpec) -> None:
        """Refuse what is sure to be too much: weights, planned births included; forward passes alone.

        Args:
            training: as trained on.
            growth: when experts are born.
            spec: for epochs and the size of a batch.

        Raises:
            InputError: what is sure to be spent, and the budget.
        """
        weights, flops = self.budget.bounds["bytes"], self.budget.bounds["flops"]
        births = [size for size in growth.most(len(training)) if size]
        born = births if growth.planned and not growth.birth.budget.bounded else []
        if self.budget.on_exceed == "cut":
            born = []
        if weights is not None:
            least = sizes_after(self.learner.model, born, growth.birth.hidden)[-1].bytes
            beside = "the optimizer and memories come on top"
            _refuse("bytes", least, weights, f"{readable(least)} of weights alone", beside)
        if flops is not None and self.budget.on_exceed == "refuse":
            least = self._forward_flops(training, spec)
            beside = "backward passes, about twice as much, come on top (or on_exceed=cut)"
            _refuse("flops", least, flops, f"{least:.3g} operations in forward passes alone", beside)

    def _forward_flops(self, training: Stream, spec: TrainerSpec) -> int:
        """Of all new examples in all passes, by one batch of the model as it starts; heads left out."""
        filled = [experience for experience in training if len(experience.train)]
        inputs, targets = filled[0].train[torch.arange(min(spec.batch_size, len(filled[0].train)))]
        with untouched(self.learner), CountFlops() as count:
            like = next(self.learner.model.parameters())
            self.learner.model(inputs.to(like) if inputs.is_floating_point() else inputs)
        return count.total * spec.epochs * sum(len(e.train) for e in filled) // len(targets)

    @property
    def cuts(self) -> list[dict[str, Any]]:
        """The events by which training has ended; not that of a branch's parent with another budget."""
        cuts = [event for event in self.learner.ledger if event["act"] == "cut"]
        return [event for event in cuts if self.budget.bounds[event["budget"]] == event["bound"]]

    @property
    def cut(self) -> bool:
        """Whether training has ended for want of budget."""
        return bool(self.cuts)

    def affords(self, experience: int) -> bool:
        """Whether an experience may begin.

        Raises:
            RunFailedError: it may not, and the budget refuses.
        """
        self.check(experience, 0)
        return not self.cut

    def check(self, experience: int, batches: int) -> None:
        """Hold what was spent against the budget, so many batches into an experience.

        Raises:
            RunFailedError: it is spent, and the budget refuses.
        """
        if not self.budget.bounded:
            return
        for name, bound in self.budget.bounds.items():
            if bound is None or self.cut or (spent := self._spent(name)) < bound:
                continue
            if self.budget.on_exceed == "refuse":
                raise RunFailedError(
                    f"budget.{name}={bound:g} is reached ({spent:g}) before the stream's end\n"
                    f"change: budget.{name}, or budget.on_exceed=cut, which measures what was trained so far"
                )
            event = {"experience": experience, "act": "cut", "budget": name, "spent": spent}
            self.learner.ledger.append({**event, "bound": bound, "batches": batches})
        if self.cut:
            self.trainer.should_stop = True

    def on_train_start(self, *args: Any) -> None:
        """A run that goes on inside an experience, from where it was cut, trains no further step."""
        if self.cut:
            self.trainer.should_stop = True

    def on_train_end(self, *args: Any) -> None:
        """The last step of a fit counts too; what it leaves to be cut comes with the next experience."""
        experience = self.learner.experience
        if self.budget.on_exceed == "refuse" and experience is not None:
            self.check(experience.index, self.learner.batches)

    def _spent(self, name: str) -> int:
        learner = self.learner
        if name == "flops":
            return learner.charges.flops["train"]
        weights = sum(p.numel() * p.element_size() for p in learner.model.parameters())
        kept = sum(strategy.buffer_bytes for strategy in learner.strategies.values())
        return weights + kept + int(optimizer_bytes(self.trainer.optimizers))


def _refuse(name: str, least: float, bound: float, words: str, beside: str) -> None:
    if least >= bound:
        raise InputError(
            got=f"a run that needs {words}, with budget.{name}={bound:g}",
            allowed=f"a budget well above {least:g}: {beside}; or a smaller run",
            key=f"budget.{name}",
        )
