"""Latent replay (Pellegrini et al. 2020, 1912.01100): memories of activations in mid network.

Legend: m rows of the memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cl_moe.errors import InputError
from cl_moe.models.base import ContinualModel
from cl_moe.seeds import derive_seed, generator
from cl_moe.strategies.base import Batch, Outlook, Setting, Step, Strategy
from cl_moe.strategies.checks import check_beside
from cl_moe.strategies.memory import Reservoir, check_memory_size
from cl_moe.strategies.passes import learning, question_of, quiet, to_model
from cl_moe.strategies.teacher import check_weight


class LatentReplay(Strategy):
    """Keeps what old examples were at a cut through the network, and trains what lies above it with them.

    Replayed rows join the batch at the cut, so that they cost the upper part alone: the loss is the mean over
    new and replayed rows together (``latent_replay`` is what that adds to the task loss). Below the cut
    learning slows down after the first experience, or stops, since what is kept there grows old otherwise
    (section 3). The memory is a reservoir that takes in an experience after it was trained.

    Args:
        memory_size: rows of activations kept.
        cut: number of the cut, from 0, the lowest (``model.cuts``; of an MLP: behind the stem, behind each
            block).
        share: replayed rows as a share of the rows that are trained on, in (0, 1).
        lower_rate: factor on gradients below the cut after the first experience, in [0, 1]. 0: it stands
            still, statistics included. Others slow plain gradient descent down, and not Adam, whose steps
            hang on no gradient's size.
    """

    needs_past = True
    stops_learning = True
    replaces_task_loss = True

    def __init__(
        self, memory_size: int = 200, cut: int = 0, share: float = 0.5, lower_rate: float = 0.0
    ) -> None:
        check_memory_size(memory_size, "strategy.latent_replay.memory_size")
        check_weight(lower_rate, "strategy.latent_replay.lower_rate")
        if not 0 < share < 1 or lower_rate > 1:
            name = "share" if not 0 < share < 1 else "lower_rate"
            key = f"strategy.latent_replay.{name}"
            raise InputError(
                got=f"share={share}, lower_rate={lower_rate}", allowed="between 0 and 1", key=key
            )
        self.cut, self.share, self.lower_rate = cut, share, lower_rate
        self.memory = Reservoir(memory_size)  # columns: activations, targets
        self._draw, self._owed = torch.Generator(), 0.0
        self._lower: set[str] = set()
        self._norms: list[nn.Module] = []
        self._outlook: Outlook | None = None

    def check(self, setting: Setting) -> None:
        """There is such a cut, and what is kept there does not grow old at once."""
        shaking = ("shrink_perturb", "continual_backprop")
        check_beside("latent_replay", setting, shaking, "draws weights below the cut anew")
        cuts = len(setting.model.cuts)
        if not isinstance(self.cut, int) or not 0 <= self.cut < cuts:
            name = type(setting.model).__name__
            allowed = f"0 .. {cuts - 1}" if cuts else "model=mlp or patch_transformer, which say where to cut"
            key = "strategy.latent_replay.cut" if cuts else "model (or strategy)"
            raise InputError(got=f"cut={self.cut} of {name}, which has {cuts}", allowed=allowed, key=key)

    def begin(self, outlook: Outlook) -> None:
        """Find out what lies below the cut; from the second experience on it is slowed down."""
        self._draw.manual_seed(derive_seed(outlook.seed, outlook.experience.index, "latent_replay"))
        self._outlook, self._owed = outlook, 0.0
        self._lower, self._norms = set(), []
        if outlook.experience.index and len(outlook.experience.train):
            sample = to_model(outlook.model, outlook.experience.train.tensors[0][:1])
            self._lower, self._norms = below(outlook.model, outlook.model.cuts[self.cut], sample)

    def batch(self, inputs: Tensor, targets: Tensor) -> Batch:
        """The batch as it is; where the lower part stands still, its statistics do."""
        if self.lower_rate == 0:
            for norm in self._norms:
                norm.training = False
        return inputs, targets

    def loss(self, step: Step) -> dict[str, Tensor]:
        """What the replayed rows add: their share of the mean loss of all rows."""
        new = len(step.targets)
        if not len(self.memory):
            return {}
        self._owed += new * self.share / (1 - self.share)
        count = int(self._owed)
        self._owed -= count
        if not count:
            return {}
        assert self._outlook is not None
        assert step.task_loss is not None
        kept_m, targets_m = (c.to(step.logits.device) for c in self.memory.sample(count, self._draw))
        with standing_in(step.model.cuts[self.cut], kept_m.to(step.logits.dtype)):
            logits, _ = step.model(step.inputs[:1])
        old = question_of(self._outlook).task_loss(logits, targets_m)
        return {"latent_replay": count / (new + count) * (old - step.task_loss)}

    def gradients(self, model: ContinualModel) -> None:
        """Slow down, or stop, what lies below the cut."""
        for name, parameter in learning(model).items():
            if name in self._lower and parameter.grad is not None:
                parameter.grad = parameter.grad * self.lower_rate if self.lower_rate else None

    @torch.no_grad()
    def end(self, outlook: Outlook) -> None:
        """Offer the activations of every training example, as in an evaluation, in random order."""
        for norm in self._norms:
            norm.training = True
        inputs, targets = outlook.experience.train.tensors
        if not len(inputs):
            return
        draw = generator(outlook.seed, outlook.experience.index, "latent reservoir")
        order = torch.randperm(len(inputs), generator=draw)
        with quiet(outlook.model), passing(outlook.model.cuts[self.cut]) as passed:
            for rows in order.split(256):
                outlook.model(to_model(outlook.model, inputs[rows]))
                self.memory.offer([passed.pop().cpu(), targets[rows]], draw)

    def state_dict(self) -> dict[str, Any]:
        """Memory and draw."""
        return {**self.memory.state_dict(), "owed": self._owed, "draw": self._draw.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        self.memory.load_state_dict(state, "strategy.latent_replay.memory_size")
        self._owed = state["owed"]
        self._draw.set_state(state["draw"])

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the activations and their targets."""
        return self.memory.bytes


@contextmanager
def passing(cut: nn.Module) -> Iterator[list[Tensor]]:
    """Collects what passes a cut inside."""
    passed: list[Tensor] = []
    hook = cut.register_forward_hook(lambda part, inputs, out: passed.append(out.detach()))
    try:
        yield passed
    finally:
        hook.remove()


@contextmanager
def standing_in(cut: nn.Module, kept: Tensor) -> Iterator[None]:
    """Passes inside go on from ``kept`` behind the cut, whatever came before it."""
    hook = cut.register_forward_hook(lambda part, inputs, out: kept)
    try:
        yield
    finally:
        hook.remove()


@torch.no_grad()
def below(model: ContinualModel, cut: nn.Module, sample: Tensor) -> tuple[set[str], list[nn.Module]]:
    """Names of what learns below a cut, and its modules with running statistics.

    Above is what belongs to a module that begins when the cut has answered; below is the rest.

    Args:
        model: as it is.
        cut: one of its cuts.
        sample: (1, ...) any input.
    """
    above: set[nn.Module] = set()
    with quiet(model), passing(cut) as passed:

        def begins(part: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if passed:
                above.update(part.modules())

        hooks = [part.register_forward_pre_hook(begins) for part in model.modules()]
        try:
            model(sample)
        finally:
            for hook in hooks:
                hook.remove()
    upper = {id(parameter) for part in above for parameter in part.parameters()}
    names = {name for name, parameter in learning(model).items() if id(parameter) not in upper}
    return names, [part for part in model.modules() if hasattr(part, "running_mean") and part not in above]
