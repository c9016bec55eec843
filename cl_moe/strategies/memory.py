"""Memories of examples: a reservoir, and one of every class.

A memory is a list of columns (inputs, targets, whatever else belongs to an example), row by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cl_moe.errors import InputError
from cl_moe.seeds import generator
from cl_moe.strategies.base import Outlook, Strategy, tensor_bytes
from cl_moe.stream import chunks


class KeepsAll(Strategy):
    """Trains on data that its view adds to an experience, all of which it keeps."""

    computes = False

    def __init__(self) -> None:
        self._kept = 0

    def end(self, outlook: Outlook) -> None:
        """All that was trained on is kept."""
        if len(outlook.experience.train):
            self._kept = tensor_bytes(*outlook.experience.train.tensors)

    def state_dict(self) -> dict[str, Any]:
        """How much that is."""
        return {"kept": self._kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take that back."""
        self._kept = state["kept"]

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the data so far."""
        return self._kept


class Reservoir:
    """Algorithm R (Vitter 1985): of n rows that were offered, each is in it with probability ``size / n``.

    Args:
        size: rows kept.
    """

    def __init__(self, size: int) -> None:
        self.size, self.seen = size, 0
        self.columns: list[Tensor] = []

    def __len__(self) -> int:
        return len(self.columns[0]) if self.columns else 0

    def offer(self, data: Sequence[Tensor], draw: torch.Generator) -> None:
        """Offer rows in order; a row past a full memory takes the place of a drawn one, or none.

        Args:
            data: columns, at least one row.
            draw: where the places are drawn from.
        """
        slots = self._slots(len(data[0]), draw)
        if not self.columns:
            self.columns = [column[:0].clone() for column in data]
        missing = min(self.size - len(self), len(data[0]))
        if missing:
            pairs = zip(self.columns, data, strict=True)
            self.columns = [torch.cat([kept, column[:missing]]) for kept, column in pairs]
        for row, slot in enumerate(slots[missing:].tolist(), start=missing):
            if slot < self.size:
                for kept, column in zip(self.columns, data, strict=True):
                    kept[slot] = column[row]
        self.seen += len(data[0])

    def _slots(self, count: int, draw: torch.Generator) -> Tensor:
        """Example n + 1 goes to a slot drawn from [0, n]; beyond the memory it is let go."""
        position = torch.arange(self.seen, self.seen + count, dtype=torch.float64)
        return (torch.rand(count, generator=draw, dtype=torch.float64) * (position + 1)).long()

    def sample(self, count: int, draw: torch.Generator) -> list[Tensor]:
        """``count`` rows drawn with replacement; of each column."""
        rows = torch.randint(len(self), (count,), generator=draw)
        return [column[rows] for column in self.columns]

    def shrink(self, size: int, draw: torch.Generator) -> None:
        """Keep a drawn part, which is a reservoir of that size too."""
        if len(self) > size:
            kept = torch.randperm(len(self), generator=draw)[:size]
            self.columns = [column[kept] for column in self.columns]
        self.size = size

    def state_dict(self) -> dict[str, Any]:
        """Rows and the counter, without which a resumed reservoir would favour the new."""
        return {"memory": [column.clone() for column in self.columns], "seen": self.seen}

    def load_state_dict(self, state: dict[str, Any], key: str) -> None:
        """Take them back; of a larger memory (a branch's parent's) a drawn part.

        Raises:
            InputError: it is smaller than what this one should hold by now; ``key`` is what to change.
        """
        rows = len(state["memory"][0]) if state["memory"] else 0
        if rows < min(state["seen"], self.size):
            raise InputError(
                got=f"a memory of {self.size} that begins with {rows} of {state['seen']} examples seen",
                allowed=f"at most {rows}: what was let go cannot be drawn any more",
                key=key,
            )
        self.columns, self.seen = [column.clone() for column in state["memory"]], state["seen"]
        self.shrink(self.size, generator(0, "shrink", rows))

    @property
    def bytes(self) -> int:
        """Bytes of the rows."""
        return tensor_bytes(*self.columns)


def take_in(memory: Reservoir | ClassMemory, outlook: Outlook, purpose: str) -> None:
    """Offer every training example of an experience to a memory, in an order drawn by ``purpose``."""
    draw = generator(outlook.seed, outlook.experience.index, purpose)
    for data in chunks(outlook.experience.train):
        order = torch.randperm(len(data[0]), generator=draw)
        memory.offer([column[order] for column in data], draw)


class ClassMemory:
    """The same number of rows of every class seen so far, each class a reservoir of its own.

    Args:
        size: rows kept, at least one per class; what does not divide evenly goes to the classes that came
            first.
        key: what to change where the size is too small.
    """

    def __init__(self, size: int, key: str) -> None:
        self.size, self.key = size, key
        self.of_class: dict[int, Reservoir] = {}
        self._whole: list[Tensor] | None = None

    def __len__(self) -> int:
        return sum(len(memory) for memory in self.of_class.values())

    def offer(self, data: Sequence[Tensor], draw: torch.Generator) -> None:
        """Offer rows in order; those of known classes make room for those of new ones."""
        inputs, targets = data
        known = set(self.of_class)
        labels = [*self.of_class, *(c for c in targets.unique().tolist() if c not in known)]
        if len(labels) > self.size:
            raise InputError(
                got=f"a memory of {self.size} for {len(labels)} classes",
                allowed=f"at least {len(labels)}",
                key=self.key,
            )
        for place, label in enumerate(labels):
            share = self.size // len(labels) + (place < self.size % len(labels))
            memory = self.of_class.setdefault(label, Reservoir(share))
            memory.shrink(share, draw)
            mine = targets == label
            if mine.any():
                memory.offer([inputs[mine], targets[mine]], draw)
        self._whole = None

    @property
    def columns(self) -> list[Tensor]:
        """All rows, class by class."""
        if self._whole is None:
            parts = [memory.columns for memory in self.of_class.values() if len(memory)]
            self._whole = [torch.cat(column) for column in zip(*parts, strict=True)]
        return self._whole

    @property
    def seen(self) -> int:
        """Rows offered so far."""
        return sum(memory.seen for memory in self.of_class.values())

    def state_dict(self) -> dict[str, Any]:
        """Each class's rows."""
        return {
            "size": self.size,
            "classes": {
                c: memory.state_dict() | {"size": memory.size} for c, memory in self.of_class.items()
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        self.of_class, self._whole = {}, None
        cut = any(len(one["memory"][0]) < one["seen"] for one in state["classes"].values())
        if state["size"] < self.size and cut:
            raise InputError(
                got=f"a memory of {self.size} that begins with one of {state['size']}",
                allowed=f"at most {state['size']}: what was let go cannot be drawn any more",
                key=self.key,
            )
        for label, one in state["classes"].items():
            self.of_class[label] = Reservoir(one["size"])
            self.of_class[label].load_state_dict(one, self.key)

    @property
    def bytes(self) -> int:
        """Bytes of the rows."""
        return sum(memory.bytes for memory in self.of_class.values())


def check_memory_size(size: int, key: str) -> None:
    """Refuse what is no whole number of 1 or more."""
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise InputError(got=f"memory_size={size!r}", allowed="a whole number, at least 1", key=key)
