"""Experience replay from a memory (Chaudhry et al. 2019, "On tiny episodic memories", 1902.10486)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cl_moe.errors import InputError
from cl_moe.seeds import derive_seed, generator
from cl_moe.strategies.base import Batch, Outlook, Setting, Strategy
from cl_moe.strategies.memory import ClassMemory, Reservoir, check_memory_size
from cl_moe.stream import chunks

BALANCES = ("none", "class")
KEY = "strategy.replay.memory_size"


class Replay(Strategy):
    """Adds examples of the past to every batch, from a memory filled by reservoir sampling (Vitter 1985).

    The memory takes in an experience after it was trained, each training example once, so that after n
    examples each of them is in it with probability ``memory_size / n``, whatever the number of epochs. With
    ``balance="class"`` every class seen so far has the same share of the memory, and a reservoir of its own.

    Args:
        memory_size: examples kept (sequences, for language).
        share: replayed examples as a share of the batch that is trained on, in (0, 1): .5 adds as many old
            examples as there are new ones. A fraction that is no whole number of examples is met on average.
        balance: ``"none"``, or ``"class"`` (classification only).
    """

    computes = False
    reads_batches = True

    def __init__(self, memory_size: int = 200, share: float = 0.5, balance: str = "none") -> None:
        check_memory_size(memory_size, KEY)
        if not 0 < share < 1:
            raise InputError(got=f"share={share}", allowed="between 0 and 1", key="strategy.replay.share")
        if balance not in BALANCES:
            allowed = ", ".join(BALANCES)
            raise InputError(got=f"balance={balance}", allowed=allowed, key="strategy.replay.balance")
        self.memory_size, self.share, self.balance = memory_size, share, balance
        self._kept: Reservoir | ClassMemory = Reservoir(memory_size)
        if balance == "class":
            self._kept = ClassMemory(memory_size, KEY)
        self._owed = 0.0
        self._draw = torch.Generator()

    @property
    def memory(self) -> list[Tensor]:
        """Columns: inputs, targets."""
        return self._kept.columns

    @property
    def seen(self) -> int:
        """Examples offered so far."""
        return self._kept.seen

    def check(self, setting: Setting) -> None:
        """Classes are balanced where there are classes."""
        if self.balance == "class" and setting.stream.kind == "language":
            raise InputError(
                got=f"strategy.replay.balance=class on stream={setting.stream.name}, which has no classes",
                allowed="strategy.replay.balance=none",
                key="strategy.replay.balance",
            )
        if self.balance == "class" and self.memory_size < setting.stream.num_classes:
            raise InputError(
                got=f"memory_size={self.memory_size} for {setting.stream.num_classes} classes",
                allowed="at least one example for each",
                key=KEY,
            )

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
        """Offer every training example of the experience to the memory, in random order."""
        draw = generator(outlook.seed, outlook.experience.index, "reservoir")
        for inputs, targets in chunks(outlook.experience.train):
            order = torch.randperm(len(inputs), generator=draw)
            if isinstance(self._kept, ClassMemory):
                self._kept.offer(inputs[order], targets[order], draw)
            else:
                self._kept.offer([inputs[order], targets[order]], draw)

    def state_dict(self) -> dict[str, Any]:
        """Memory with its counter; the draw."""
        return {**self._kept.state_dict(), "owed": self._owed, "draw": self._draw.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        if ("classes" in state) != isinstance(self._kept, ClassMemory):
            raise InputError(
                got=f"balance={self.balance} that begins with a memory balanced otherwise",
                allowed="the balance of the run that this one goes on from",
                key="strategy.replay.balance",
            )
        if isinstance(self._kept, ClassMemory):
            self._kept.load_state_dict(state)
        else:
            self._kept.load_state_dict(state, KEY)
        self._owed = state["owed"]
        self._draw.set_state(state["draw"])

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the memory."""
        return self._kept.bytes
