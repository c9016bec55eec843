"""Experience replay from a memory (Chaudhry et al. 2019, "On tiny episodic memories", 1902.10486)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cl_moe.errors import InputError
from cl_moe.seeds import derive_seed
from cl_moe.strategies.base import Batch, Outlook, Setting, Strategy
from cl_moe.strategies.checks import check_room
from cl_moe.strategies.herding import HerdedMemory
from cl_moe.strategies.memory import ClassMemory, Reservoir, check_memory_size, take_in

POLICIES = ("reservoir", "balanced", "herding")
BALANCES = ("none", "class")
KEY = "strategy.replay.memory_size"
Memory = Reservoir | ClassMemory | HerdedMemory


class Replay(Strategy):
    """Adds examples of the past to every batch.

    They are from a memory that takes in an experience after it was trained, each training example once,
    whatever the number of epochs. It is one of these:

    - ``reservoir`` (Vitter 1985): of n examples each is in it with probability ``memory_size / n``;
    - ``balanced``: every class so far has the same share of it, and a reservoir of its own;
    - ``herding``: every class has the same share, those examples whose mean feature is next to the class's
      (iCaRL's exemplars, 1611.07725; ``icarl`` is the whole method).

    Args:
        memory_size: examples kept (sequences, for language).
        share: replayed examples as a share of the batch that is trained on, in (0, 1): .5 adds as many old
            examples as there are new ones. A fraction that is no whole number of examples is met on average.
        policy: ``"reservoir"``, ``"balanced"`` or ``"herding"``; the last two for classification only.
        balance: an older name: ``"class"`` is ``policy="balanced"``.
    """

    needs_past = True

    def __init__(
        self, memory_size: int = 200, share: float = 0.5, policy: str = "reservoir", balance: str = "none"
    ) -> None:
        check_memory_size(memory_size, KEY)
        if not 0 < share < 1:
            raise InputError(got=f"share={share}", allowed="between 0 and 1", key="strategy.replay.share")
        for name, choice, known in (("policy", policy, POLICIES), ("balance", balance, BALANCES)):
            if choice not in known:
                key = f"strategy.replay.{name}"
                raise InputError(got=f"{name}={choice}", allowed=", ".join(known), key=key)
        if balance == "class" and policy == "herding":
            raise InputError(
                got="balance=class beside policy=herding",
                allowed="one of them: herding is balanced, too",
                key="strategy.replay.balance",
            )
        self.memory_size, self.share = memory_size, share
        self.policy = "balanced" if balance == "class" else policy
        self.computes = self.policy == "herding"  # it asks the model for features
        self.reads_batches = self.policy != "herding"
        self._kept = self._empty()
        self._owed = 0.0
        self._draw = torch.Generator()

    def _empty(self) -> Memory:
        if self.policy == "reservoir":
            return Reservoir(self.memory_size)
        kind = ClassMemory if self.policy == "balanced" else HerdedMemory
        return kind(self.memory_size, KEY)

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
        if self.policy != "reservoir" and setting.stream.kind != "classification":
            raise InputError(
                got=f"strategy.replay.policy={self.policy} on stream={setting.stream.name}, "
                "which has no classes",
                allowed="strategy.replay.policy=reservoir",
                key="strategy.replay.policy",
            )
        if self.policy != "reservoir":
            check_room("replay", self.memory_size, setting.stream)

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
        """Offer every training example of the experience to the memory."""
        if isinstance(self._kept, HerdedMemory):
            self._kept.take_in(outlook)
        else:
            take_in(self._kept, outlook, "reservoir")

    def state_dict(self) -> dict[str, Any]:
        """Memory with its counter; the draw."""
        return {**self._kept.state_dict(), "owed": self._owed, "draw": self._draw.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        kind = "herding" if "herded" in state else "balanced" if "classes" in state else "reservoir"
        if kind != self.policy:
            raise InputError(
                got=f"policy={self.policy} that begins with a memory of policy={kind}",
                allowed="the policy of the run that this one goes on from",
                key="strategy.replay.policy",
            )
        if isinstance(self._kept, Reservoir):
            self._kept.load_state_dict(state, KEY)
        else:
            self._kept.load_state_dict(state)
        self._owed = state["owed"]
        self._draw.set_state(state["draw"])

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the memory."""
        return self._kept.bytes
