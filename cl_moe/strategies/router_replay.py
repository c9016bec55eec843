"""Router-only replay: memories tell the router where old examples belong, and no expert anything."""

from __future__ import annotations

from typing import Any

import torch

from cl_moe.errors import InputError
from cl_moe.layers.router_parts import router_names
from cl_moe.models.base import ContinualModel
from cl_moe.seeds import derive_seed
from cl_moe.strategies.base import Outlook, Setting, Strategy
from cl_moe.strategies.checks import check_beside
from cl_moe.strategies.memory import Reservoir, check_memory_size, take_in
from cl_moe.strategies.passes import learning, memory_gradient
from cl_moe.strategies.teacher import check_weight


class RouterReplay(Strategy):
    """Adds the gradient of the task loss on a sample of the memory to what chooses, and to nothing else.

    What routing forgot, as opposed to weights, is thus repaired at the price of few examples: old experts are
    found again, and what they compute is not held. Beside ``freeze=past_experts`` only keys of live cohorts
    and what the router shares learn. The memory is a reservoir that takes in an experience after it was
    trained. Looking back is as in an evaluation: no statistics move, nothing is dropped out.

    Args:
        memory_size: examples kept (sequences, for language).
        sample_size: examples of the memory in each step, drawn anew.
        strength: weight of their gradient beside that of the new batch.
    """

    computes = False
    needs_past = True
    reads_batches = True

    def __init__(self, memory_size: int = 200, sample_size: int = 32, strength: float = 1.0) -> None:
        check_memory_size(memory_size, "strategy.router_replay.memory_size")
        check_weight(strength, "strategy.router_replay.strength")
        if not isinstance(sample_size, int) or sample_size < 1:
            raise InputError(
                got=f"sample_size={sample_size!r}",
                allowed="a whole number, at least 1",
                key="strategy.router_replay.sample_size",
            )
        self.sample_size, self.strength = sample_size, strength
        self.memory = Reservoir(memory_size)
        self._draw = torch.Generator()
        self._outlook: Outlook | None = None

    def check(self, setting: Setting) -> None:
        """There is a router that learns."""
        if not router_names(setting.model):
            raise InputError(
                got="strategy=router_replay with a model that routes nothing (layer=dense, say)",
                allowed="layer=moe, peer or pkm",
                key="layer (or strategy)",
            )
        stopping = ("router_freezing", "sparse_memory")
        check_beside("router_replay", setting, stopping, "takes the router's gradients away")

    def begin(self, outlook: Outlook) -> None:
        """Draw this experience's samples from a seed of their own."""
        self._draw.manual_seed(derive_seed(outlook.seed, outlook.experience.index, "router replay"))
        self._outlook = outlook

    def gradients(self, model: ContinualModel) -> None:
        """Add the memory's gradient to the router's parameters."""
        if not len(self.memory) or self._outlook is None:
            return
        rows = torch.randperm(len(self.memory), generator=self._draw)[: self.sample_size]
        kept = (self.memory.columns[0][rows], self.memory.columns[1][rows])
        live = learning(model)
        names = {name for name in router_names(model) if name in live}
        for name, gradient in memory_gradient(self._outlook, kept, self._draw, names).items():
            parameter, added = live[name], self.strength * gradient
            parameter.grad = added if parameter.grad is None else parameter.grad + added

    def end(self, outlook: Outlook) -> None:
        """Offer every training example of the experience to the reservoir, in random order."""
        take_in(self.memory, outlook, "router replay reservoir")

    def state_dict(self) -> dict[str, Any]:
        """Memory and draw."""
        return {**self.memory.state_dict(), "draw": self._draw.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        self.memory.load_state_dict(state, "strategy.router_replay.memory_size")
        self._draw.set_state(state["draw"])

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the memory."""
        return self.memory.bytes
