"""GDumb: a greedy balanced memory and a model trained on it from scratch (Prabhu et al. 2020, ECCV)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from cl_moe.errors import InputError
from cl_moe.models.base import ContinualModel
from cl_moe.seeds import generator
from cl_moe.strategies.base import Batch, Outlook, Setting, Strategy, tensor_bytes
from cl_moe.strategies.checks import check_new_classes, check_room
from cl_moe.strategies.memory import check_memory_size
from cl_moe.strategies.teacher import still_names
from cl_moe.stream import Stream, concatenate, take


class GDumb(Strategy):
    """Learns nothing but a memory, anew after each experience.

    The memory takes an example greedily (algorithm 1) if its class has less than its share of the places;
    when full, it lets go of a drawn example of the largest class. Training on experience i is training on the
    memory as it stands after i, from the weights that the model began with (newborn experts and head rows:
    the weights they were born with; what is frozen stays). Optimizer and epochs are the run's; the paper has
    its own schedule and CutMix.

    Args:
        memory_size: examples kept, at least one for each class.
        seed: for the order in which examples arrive, and which ones are let go.
    """

    computes = False

    def __init__(self, memory_size: int = 200, seed: int = 0) -> None:
        check_memory_size(memory_size, "strategy.gdumb.memory_size")
        self.memory_size, self.seed = memory_size, seed
        self.born: dict[str, Tensor] = {}  # weights and statistics as they were before any training
        self._kept, self._waiting = 0, False
        self._model: ContinualModel | None = None

    def check(self, setting: Setting) -> None:
        """Classes are what is balanced; nothing else survives a start from scratch."""
        stream, others = setting.stream, [name for name in setting.names if name not in ("gdumb", "naive")]
        check_new_classes("gdumb", stream)
        if others:
            raise InputError(
                got=f"strategy=gdumb beside {', '.join(others)}",
                allowed="gdumb alone: its model starts from scratch in every experience",
                key="strategy",
            )
        check_room("gdumb", self.memory_size, stream)

    def view(self, stream: Stream) -> Stream:
        """Experience i holds the memory as it stands after the data of 0 .. i."""
        every = concatenate([experience.train for experience in stream])
        memory, first, seen = _Greedy(self.memory_size), 0, []
        for experience in stream:
            draw = generator(self.seed, experience.index, "gdumb")
            order = first + torch.randperm(len(experience.train), generator=draw)
            for row in order.tolist():
                memory.offer(row, int(every.tensors[1][row]), draw)
            first += len(order)
            seen.append(replace(experience, train=_rows(every, memory.rows)))
        return replace(stream, experiences=tuple(seen))

    def begin(self, outlook: Outlook) -> None:
        """Note how newborns were born. The start from scratch waits for a step: this may be a restart."""
        self._model, self._waiting = outlook.model, True
        still = set(still_names(outlook.model))
        live = {name: value for name, value in outlook.model.state_dict().items() if name not in still}
        self.born = {
            name: self.born.get(name, value).detach().to(value, copy=name not in self.born)
            for name, value in live.items()
        }

    @torch.no_grad()
    def batch(self, inputs: Tensor, targets: Tensor) -> Batch:
        """The batch as it is; before the first one, the model forgets everything."""
        if self._waiting:
            assert self._model is not None
            live = self._model.state_dict()
            for name, value in self.born.items():
                live[name].copy_(value)
            self._waiting = False
        return inputs, targets

    def end(self, outlook: Outlook) -> None:
        """What was trained on is the memory."""
        self._kept = tensor_bytes(*outlook.experience.train.tensors)

    def state_dict(self) -> dict[str, Any]:
        """First weights, and whether this experience has started from them yet."""
        return {"born": self.born, "kept": self._kept, "waiting": self._waiting}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        self.born, self._kept = dict(state["born"]), state["kept"]
        self._waiting = state["waiting"]

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the memory and of the first weights."""
        return self._kept + tensor_bytes(*self.born.values())


class _Greedy:
    """Row numbers in memory, by class."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.of_class: dict[int, list[int]] = {}

    def offer(self, row: int, label: int, draw: torch.Generator) -> None:
        """Algorithm 1 of the paper, for one example; of equally large classes the first one gives."""
        share = self.size / len(self.of_class.keys() | {label})
        if len(self.of_class.get(label, [])) >= share:
            return
        if len(self.rows) >= self.size:
            largest = max(self.of_class.values(), key=len)
            largest.pop(int(torch.randint(len(largest), (1,), generator=draw)))
        self.of_class.setdefault(label, []).append(row)

    @property
    def rows(self) -> list[int]:
        """All of them, class by class."""
        return [row for rows in self.of_class.values() for row in rows]


def _rows(data: TensorDataset, rows: list[int]) -> TensorDataset:
    return take(data, torch.tensor(rows, dtype=torch.long))
