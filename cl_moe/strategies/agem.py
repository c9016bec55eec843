"""Averaged gradient episodic memory (Chaudhry et al. 2019, 1812.00420)."""

from __future__ import annotations

from typing import Any

import torch

from cl_moe.errors import InputError
from cl_moe.models.base import ContinualModel
from cl_moe.seeds import derive_seed
from cl_moe.strategies.base import Outlook, Strategy
from cl_moe.strategies.memory import Reservoir, check_memory_size, take_in
from cl_moe.strategies.passes import learning, memory_gradient


class AGEM(Strategy):
    """Lets no step raise the loss on a sample of the memory, to first order.

    Where the gradient g and the gradient r of that loss point apart (g.r < 0), g becomes
    ``g - (g.r / r.r) r`` (equation 11): the nearest one that does not. The memory is a reservoir that takes
    in an experience after it was trained (the paper fills a part per task from its end). g is the gradient of
    the whole loss, other strategies' terms included.

    Args:
        memory_size: examples kept (sequences, for language).
        sample_size: examples of the memory that r is measured on, drawn anew in each step.
    """

    computes = False
    needs_past = True

    def __init__(self, memory_size: int = 200, sample_size: int = 64) -> None:
        check_memory_size(memory_size, "strategy.agem.memory_size")
        if not isinstance(sample_size, int) or sample_size < 1:
            raise InputError(
                got=f"sample_size={sample_size!r}",
                allowed="a whole number, at least 1",
                key="strategy.agem.sample_size",
            )
        self.sample_size = sample_size
        self.memory = Reservoir(memory_size)
        self._draw = torch.Generator()
        self._outlook: Outlook | None = None

    def begin(self, outlook: Outlook) -> None:
        """Draw this experience's samples from a seed of their own."""
        self._draw.manual_seed(derive_seed(outlook.seed, outlook.experience.index, "agem"))
        self._outlook = outlook

    def gradients(self, model: ContinualModel) -> None:
        """Turn the gradient away from what would raise the memory's loss."""
        if not len(self.memory) or self._outlook is None:
            return
        count = min(self.sample_size, len(self.memory))
        rows = torch.randperm(len(self.memory), generator=self._draw)[:count]
        inputs, targets = (column[rows] for column in self.memory.columns)
        reference = memory_gradient(self._outlook, (inputs, targets), self._draw)
        live = learning(model)
        pairs = [(live[name], r) for name, r in reference.items()]
        along = sum(float((p.grad.double() * r.double()).sum()) for p, r in pairs if p.grad is not None)
        length = sum(float(r.double().square().sum()) for _, r in pairs)
        if along < 0 and length > 0:
            for parameter, r in pairs:
                turned = -(along / length) * r
                parameter.grad = turned if parameter.grad is None else parameter.grad + turned

    def end(self, outlook: Outlook) -> None:
        """Offer every training example of the experience to the reservoir, in random order."""
        take_in(self.memory, outlook, "agem reservoir")

    def state_dict(self) -> dict[str, Any]:
        """Memory and draw."""
        return {**self.memory.state_dict(), "draw": self._draw.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        self.memory.load_state_dict(state, "strategy.agem.memory_size")
        self._draw.set_state(state["draw"])

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the memory."""
        return self.memory.bytes
