"""Herding: the few examples of a class whose mean feature stays next to that of all (Welling 2009).

Legend: D width of the features, n examples of a class.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from cl_moe.errors import InputError
from cl_moe.strategies.base import Outlook, tensor_bytes
from cl_moe.strategies.passes import features_of


class HerdedMemory:
    """The same number of examples of every class so far, those that herding chose, the most telling first.

    As the memory of iCaRL (1611.07725, algorithms 4 and 5): as classes come, each list loses its end.

    Args:
        size: rows kept; ``size // classes`` of each.
        key: what to change where the size is too small.
    """

    def __init__(self, size: int, key: str) -> None:
        self.size, self.key = size, key
        self.of_class: dict[int, Tensor] = {}
        self.seen = 0

    def __len__(self) -> int:
        return sum(len(inputs) for inputs in self.of_class.values())

    def take_in(self, outlook: Outlook) -> None:
        """Choose among an experience's training examples, and shorten the lists of the other classes.

        A class that comes again is chosen anew among what was kept and what came, by the model of now.
        """
        inputs, targets = outlook.experience.train.tensors
        if not len(inputs):
            return
        labels = list(dict.fromkeys([*self.of_class, *outlook.experience.classes]))
        share = self.size // len(labels)
        if share < 1:
            allowed = f"at least {len(labels)}"
            raise InputError(
                got=f"a memory of {self.size} for {len(labels)} classes", allowed=allowed, key=self.key
            )
        for label in labels:
            pool = inputs[targets == label]
            if len(pool):
                if label in self.of_class:
                    pool = torch.cat([self.of_class[label], pool])
                self.of_class[label] = pool[herd(features_of(outlook.model, pool), share)]
            elif label in self.of_class:
                self.of_class[label] = self.of_class[label][:share].clone()
        self.seen += len(inputs)

    @property
    def columns(self) -> list[Tensor]:
        """All rows, class by class: inputs, targets."""
        if not self.of_class:
            return []
        labels = [torch.full((len(kept),), label) for label, kept in self.of_class.items()]
        return [torch.cat(list(self.of_class.values())), torch.cat(labels)]

    def state_dict(self) -> dict[str, Any]:
        """Each class's rows."""
        return {"herded": self.of_class, "seen": self.seen, "size": self.size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back; of a larger memory (a branch's parent's) the beginnings."""
        if self.size > state["size"] and sum(map(len, state["herded"].values())) < state["seen"]:
            raise InputError(
                got=f"a memory of {self.size} that begins with one of {state['size']}",
                allowed=f"at most {state['size']}: what was let go cannot be chosen any more",
                key=self.key,
            )
        share = self.size // max(len(state["herded"]), 1)
        self.of_class = {label: kept[:share] for label, kept in state["herded"].items()}
        self.seen = state["seen"]

    @property
    def bytes(self) -> int:
        """Bytes of the rows."""
        return tensor_bytes(*self.of_class.values())


def herd(features_nD: Tensor, count: int) -> Tensor:
    """(min(count, n),) rows whose running mean stays nearest to the mean of all (algorithm 4), in order.

    Features are normalised to length 1 first; means are not normalised again here. Ties go to the lower row.
    """
    unit_nD = F.normalize(features_nD.double(), dim=1)
    mean_D, sum_D = unit_nD.mean(dim=0), torch.zeros_like(unit_nD[0])
    free_n = torch.ones(len(unit_nD), dtype=torch.bool)
    chosen: list[int] = []
    for k in range(1, min(count, len(unit_nD)) + 1):
        away_n = (mean_D - (sum_D + unit_nD) / k).square().sum(dim=1)
        best = int(away_n.masked_fill(~free_n, torch.inf).argmin())
        chosen.append(best)
        free_n[best] = False
        sum_D = sum_D + unit_nD[best]
    return torch.tensor(chosen, dtype=torch.long)
