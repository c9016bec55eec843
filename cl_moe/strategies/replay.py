"""Experience replay with a reservoir (Chaudhry et al. 2019, "On tiny episodic memories", 1902.10486)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cl_moe.errors import InputError
from cl_moe.seeds import derive_seed, generator
from cl_moe.strategies.base import Batch, Outlook, Strategy, tensor_bytes


class Replay(Strategy):
    """Adds examples of the past to every batch, from a memory filled by reservoir sampling (Vitter 1985).

    The memory takes in an experience after it was trained, each training example once, so that after n
    examples each of them is in it with probability ``memory_size / n``, whatever the number of epochs.

    Args:
        memory_size: examples kept (sequences, for language).
        share: replayed examples as a share of the batch that is trained on, in (0, 1): .5 adds as many old
            examples as there are new ones. A fraction that is no whole number of examples is met on average.
    """

    computes = False

    def __init__(self, memory_size: int = 200, share: float = 0.5) -> None:
        if not isinstance(memory_size, int) or memory_size < 1:
            raise InputError(
                got=f"memory_size={memory_size!r}",
                allowed="a whole number, at least 1",
                key="strategy.replay.memory_size",
            )
        if not 0 < share < 1:
            raise InputError(got=f"share={share}", allowed="between 0 and 1", key="strategy.replay.share")
        self.memory_size, self.share = memory_size, share
        self.memory: list[Tensor] = []  # columns: inputs, targets
        self.seen = 0
        self._owed = 0.0
        self._draw = torch.Generator()

    def begin(self, outlook: Outlook) -> None:
        """Draw this experience's memories from a seed of their own."""
        self._draw.manual_seed(derive_seed(outlook.seed, outlook.experience.index, "replay"))
        self._owed = 0.0

    def batch(self, inputs: Tensor, targets: Tensor) -> Batch:
        """The batch with memories behind it, drawn with replacement."""
        if not self.memory:
            return inputs, targets
        self._owed += len(inputs) * self.share / (1 - self.share)
        count = int(self._owed)
        self._owed -= count
        rows = torch.randint(len(self.memory[0]), (count,), generator=self._draw)
        old_inputs, old_targets = (column[rows].to(inputs.device) for column in self.memory)
        return torch.cat([inputs, old_inputs]), torch.cat([targets, old_targets])

    def end(self, outlook: Outlook) -> None:
        """Offer every training example of the experience to the reservoir, in random order."""
        data = outlook.experience.train.tensors
        if not len(data[0]):
            return
        draw = generator(outlook.seed, outlook.experience.index, "reservoir")
        order = torch.randperm(len(data[0]), generator=draw)
        slots = self._slots(len(order), draw)
        if not self.memory:
            self.memory = [column[:0].clone() for column in data]
        missing = min(self.memory_size - len(self.memory[0]), len(order))
        self.memory = [
            torch.cat([kept, column[order[:missing]]]) for kept, column in zip(self.memory, data, strict=True)
        ]
        for row, slot in zip(order[missing:].tolist(), slots[missing:].tolist(), strict=True):
            if slot < self.memory_size:
                for kept, column in zip(self.memory, data, strict=True):
                    kept[slot] = column[row]
        self.seen += len(order)

    def _slots(self, count: int, draw: torch.Generator) -> Tensor:
        """Algorithm R: example n + 1 goes to a slot drawn from [0, n]; beyond the memory it is let go."""
        position = torch.arange(self.seen, self.seen + count, dtype=torch.float64)
        return (torch.rand(count, generator=draw, dtype=torch.float64) * (position + 1)).long()

    def state_dict(self) -> dict[str, Any]:
        """Memory; the counter, without which a resumed reservoir would favour the new; the draw."""
        return {
            "memory": self.memory,
            "seen": self.seen,
            "owed": self._owed,
            "draw": self._draw.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        self.memory, self.seen = self._fitting(list(state["memory"]), state["seen"]), state["seen"]
        self._owed = state["owed"]
        self._draw.set_state(state["draw"])

    def _fitting(self, memory: list[Tensor], seen: int) -> list[Tensor]:
        """A memory of another size, of a branch's parent: a part drawn from it is a reservoir too."""
        rows = len(memory[0]) if memory else 0
        if rows < min(seen, self.memory_size):
            raise InputError(
                got=f"a memory of {self.memory_size} that begins with {rows} of {seen} examples seen",
                allowed=f"at most {rows}: what was let go cannot be drawn any more",
                key="strategy.replay.memory_size",
            )
        if rows <= self.memory_size:
            return memory
        kept = torch.randperm(rows, generator=generator(0, "shrink", rows))[: self.memory_size]
        return [column[kept] for column in memory]

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the memory."""
        return tensor_bytes(*self.memory)
