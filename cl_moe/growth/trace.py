"""What training itself shows of the past: losses before the step on them, and who worked (no test data).

Legend: B new examples of a batch, N experts of a layer, C cohorts of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cl_moe.agreement import rows_of_all
from cl_moe.layers.ranks import sum_over_ranks
from cl_moe.layers.routing import Routing, fold_load


class Looks(NamedTuple):
    """What a schedule or a policy wants to see; what nobody wants is not kept.

    Args:
        samples: losses of so many of the newest examples, and of the first of the next experience.
        losses: the mean loss of every experience.
        loads: loads in training.
    """

    samples: int = 0
    losses: bool = False
    loads: bool = False

    def __or__(self, other: Looks) -> Looks:
        """What either of two wants."""
        return Looks(max(self.samples, other.samples), self.losses or other.losses, self.loads or other.loads)


class Trace:
    """Follows the training of each experience; its state is part of every checkpoint.

    Losses are the stream's new examples' alone, replayed ones left out. Loads are in units of the fair share,
    1/N of an experience's routed weight: 1 is what an expert takes where all take the same.

    Args:
        looks: what is kept.

    Attributes:
        newest: (n,) float64, losses of the last ``samples`` examples of the first pass through the newest
            experience, each before the step on it (prequential: Dawid 1984).
        means: of each experience the mean loss in its last pass; NaN if it was not trained or followed.
        totals: by layer (N,) float64, the loads in the last pass through each experience, added up.
        peaks: by layer (N,) float64, the largest of them.
        lives: by layer (N,) float64, experiences that an expert was trained in since it began.
        shares: by layer, for each experience the share of routed weight of every cohort of then.
    """

    def __init__(self, looks: Looks = Looks()) -> None:  # noqa: B008 - a NamedTuple does not change
        self.looks = looks
        self.newest = torch.zeros(0, dtype=torch.float64)
        self.means: list[float] = []
        self.totals: dict[int, Tensor] = {}
        self.peaks: dict[int, Tensor] = {}
        self.lives: dict[int, Tensor] = {}
        self.shares: dict[int, list[list[float]]] = {}
        self._batches, self._per_pass = 0, 1
        self._sum: Tensor | float = 0.0
        self._count = 0
        self._loads: dict[int, Tensor] = {}

    @property
    def follows(self) -> bool:
        """Whether ``add`` has anything to do."""
        return any(self.looks)

    def open(self, per_pass: int, experience: int) -> None:
        """The experience of this number begins, of so many batches in a pass."""
        if self.looks.losses:  # those before it that nobody followed: the parent of a branch kept none
            self.means += [float("nan")] * (experience - len(self.means))
        self.newest, self._batches, self._per_pass = self.newest[:0], 0, per_pass
        self._begin_pass()

    def _begin_pass(self) -> None:
        self._sum, self._count, self._loads = 0.0, 0, {}

    @torch.no_grad()
    def add(self, losses_B: Tensor, routings: Mapping[int, Routing]) -> None:
        """Take up a batch, this rank's part of it: losses of new examples, and what the layers routed.

        What all ranks took up is gathered here, so that they know the same.
        """
        losses_B = rows_of_all(losses_B)
        if self._batches % self._per_pass == 0:
            self._begin_pass()
        asked_B = losses_B[~losses_B.isnan()]
        first_pass, self._batches = self._batches < self._per_pass, self._batches + 1
        if first_pass and self.looks.samples:
            self.newest = torch.cat([self.newest.to(asked_B), asked_B])[-self.looks.samples :]
        if self.looks.losses:
            self._sum, self._count = self._sum + asked_B.sum(), self._count + len(asked_B)
        if self.looks.loads:
            for layer, routing in routings.items():
                score_N = sum_over_ranks(fold_load(routing).score)
                self._loads[layer] = score_N + self._loads[layer] if layer in self._loads else score_N

    def close(self, sizes: Mapping[int, Sequence[int]]) -> None:
        """The experience was trained, by layers with cohorts of these sizes."""
        if self.looks.losses:
            self.means.append(float(self._sum) / self._count if self._count else float("nan"))
        for layer, score_N in self._loads.items():
            if layer not in sizes:
                continue  # a block that tokens pass by chooses among no experts
            share_N = (score_N / score_N.sum().clamp_min(torch.finfo(torch.float64).tiny)).cpu()
            load_N = share_N * len(share_N)
            self.totals[layer] = _padded(self.totals.get(layer), load_N) + load_N
            self.peaks[layer] = torch.maximum(_padded(self.peaks.get(layer), load_N), load_N)
            self.lives[layer] = _padded(self.lives.get(layer), load_N) + 1
            shares = [part.sum().item() for part in share_N.split(list(sizes[layer]))]
            self.shares.setdefault(layer, []).append(shares)
        self._begin_pass()

    def of_layer(self, layer: int, num_experts: int) -> tuple[Tensor, Tensor, Tensor] | None:
        """Of each expert the mean load since it began, the largest, and the number of experiences; (N,) each.

        0 for newborns; None where nothing was trained.
        """
        if layer not in self.totals:
            return None
        like_N = torch.zeros(num_experts)
        total_N, peak_N, life_N = (
            _padded(kept[layer], like_N) for kept in (self.totals, self.peaks, self.lives)
        )
        return total_N / life_N.clamp_min(1), peak_N, life_N

    def forget(self, layer: int, experts: Sequence[int]) -> None:
        """Experts of a layer begin anew."""
        for kept in (self.totals, self.peaks, self.lives):
            if layer in kept:
                kept[layer][list(experts)] = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain Python only."""
        return {
            "newest": self.newest.cpu(),
            "means": list(self.means),
            "totals": {layer: total.clone() for layer, total in self.totals.items()},
            "peaks": {layer: peak.clone() for layer, peak in self.peaks.items()},
            "lives": {layer: life.clone() for layer, life in self.lives.items()},
            "shares": {layer: [list(row) for row in rows] for layer, rows in self.shares.items()},
            "batches": (self._batches, self._per_pass),
            "pass": (float(self._sum), self._count, {i: load.cpu() for i, load in self._loads.items()}),
        }

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Go on from what ``state_dict`` gave; None, of a run that kept none: from nothing."""
        if state is None or "lives" not in state:
            return
        self.newest, self.means = state["newest"], list(state["means"])
        self.totals = {layer: total.clone() for layer, total in state["totals"].items()}
        self.peaks = {layer: peak.clone() for layer, peak in state["peaks"].items()}
        self.lives = {layer: life.clone() for layer, life in state["lives"].items()}
        self.shares = {layer: [list(row) for row in rows] for layer, rows in state["shares"].items()}
        self._batches, self._per_pass = state["batches"]
        self._sum, self._count, loads = state["pass"]
        self._loads = dict(loads)


def _padded(known: Tensor | None, like_N: Tensor) -> Tensor:
    """With zeros for experts born since."""
    old = torch.zeros(0, dtype=torch.float64) if known is None else known
    return torch.cat([old, old.new_zeros(len(like_N) - len(old))])
