"""A dense run that goes on as a mixture: what the child's first state has of its parent's."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cl_moe.growth.adapt import Event, replay, upcycle
from cl_moe.models.base import ContinualModel


@dataclass(frozen=True)
class Upcycled:
    """A mixture whose experts are copies of a dense model's layers (Komatsuzaki et al., 2212.05055).

    Args:
        weights: of the mixture, by name.
        ledger: the parent's, and what was done.
        exact: whether it computes what the dense model did, to rounding.
    """

    weights: Mapping[str, Tensor]
    ledger: list[Event]
    exact: bool

    @classmethod
    def of(
        cls,
        model: ContinualModel,
        dense: ContinualModel,
        ledger: Sequence[Event],
        boundary: int,
        noise: float = 0.0,
        seed: int = 0,
    ) -> Upcycled:
        """Copy a dense model into a fresh mixture, which is left as it is.

        Args:
            model: the fresh mixture, without the rows of its head.
            dense: the parent's model.
            ledger: of the parent; what it froze is frozen here.
            boundary: experiences that the parent was trained on.
            noise: of the copies, see ``growth.adapt.upcycle``.
            seed: that the noise is drawn from.

        Raises:
            InputError: the layers are of the wrong kind, or their shapes or formulas differ.
        """
        twin = copy.deepcopy(model)
        replay(twin, ledger)
        events = upcycle(twin, dense, boundary, noise, seed)
        return cls(twin.state_dict(), [*ledger, *events], all(event["exact"] for event in events))

    def take_over(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """The parent's state as the child's.

        The optimizer's state of what was replaced is dropped. So is that of strategies which remember
        parameters by name (an old model's values, say): those begin as strategies that are new in the child.
        """
        learner = state["learner"]
        kept = {f"model.{name}" for name in self.weights}  # as the learner calls them
        theirs = {word for name in learner["model"] for word in (name, f"model.{name}")}
        changed = {
            "ledger": self.ledger,
            "model": self.weights,
            "optimizer": {name: one for name, one in learner["optimizer"].items() if name in kept},
            "strategies": {
                name: one for name, one in learner["strategies"].items() if not _speaks_of(one, theirs)
            },
        }
        return {**state, "learner": {**learner, **changed}}


def _speaks_of(state: Any, names: Set[str]) -> bool:
    """Whether one of the names stands anywhere in a plain state."""
    if isinstance(state, Mapping):
        return any(_speaks_of(part, names) for pair in state.items() for part in pair)
    if isinstance(state, list | tuple):
        return any(_speaks_of(part, names) for part in state)
    return isinstance(state, str) and state in names
