"""Old values of weights and how much each of them matters: what EWC, SI and MAS have in common.

What is kept goes by the parameter's name, which growth never moves: newborns have none yet, and what was
frozen needs none any more. A head's rows have the name of their cohort.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cl_moe.errors import InputError
from cl_moe.seeds import generator
from cl_moe.strategies.base import Outlook, tensor_bytes
from cl_moe.strategies.passes import learning


class Anchors:
    """Importances and old values by name.

    Args:
        importance: >= 0, float32 or wider, of each parameter's shape.
        values: the parameters as they were.
    """

    def __init__(
        self, importance: Mapping[str, Tensor] | None = None, values: Mapping[str, Tensor] | None = None
    ) -> None:
        self.importance, self.values = dict(importance or {}), dict(values or {})

    def penalty(self, model: nn.Module) -> Tensor | None:
        """Sum of importance x squared distance to the old value, a scalar; None where nothing is kept."""
        terms = [
            (self.importance[name] * (p - self.values[name]).square()).sum()
            for name, p in learning(model).items()
            if name in self.importance
        ]
        return torch.stack(terms).sum() if terms else None

    def settle(self, model: nn.Module) -> None:
        """Drop what was frozen, and move the rest to where the model computes."""
        live, device = learning(model), next(model.parameters()).device
        self.importance = {n: v.to(device) for n, v in self.importance.items() if n in live}
        self.values = {n: v.to(device) for n, v in self.values.items() if n in live}

    def state_dict(self) -> dict[str, Any]:
        """Both, by name."""
        return {"importance": self.importance, "values": self.values}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any], device: torch.device) -> Anchors:
        """What ``state_dict`` gave."""
        importance, values = state["importance"], state["values"]
        return cls(
            {name: value.to(device) for name, value in importance.items()},
            {name: value.to(device) for name, value in values.items()},
        )

    @property
    def bytes(self) -> int:
        """Bytes of both."""
        return tensor_bytes(*self.importance.values(), *self.values.values())


def values_now(model: nn.Module) -> dict[str, Tensor]:
    """Copies of what learns."""
    return {name: p.detach().clone() for name, p in learning(model).items()}


def add_importance(old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``new`` plus what there was of the same parameters; the others drop out."""
    return {name: old[name] + value if name in old else value for name, value in new.items()}


def sampled_rows(outlook: Outlook, samples: int | None, purpose: str) -> Tensor:
    """Rows of the training data that importances are measured on: all (None), or so many drawn ones."""
    count, experience = len(outlook.experience.train), outlook.experience.index
    if samples is None or samples >= count:
        return torch.arange(count)
    return torch.randperm(count, generator=generator(outlook.seed, experience, purpose))[:samples]


def check_samples(samples: int | None, key: str) -> None:
    """Refuse what is neither null nor a whole number of 1 or more."""
    if samples is not None and (not isinstance(samples, int) or samples < 1):
        raise InputError(got=f"{samples!r}", allowed="a whole number, at least 1, or null for all", key=key)
