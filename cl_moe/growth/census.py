"""What a growth schedule and a freeze policy may see: the past, never test data of the future."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerCensus:
    """One expert layer before an experience.

    Args:
        sizes: experts per cohort, oldest first.
        births: for each cohort, the number of experiences trained before its birth.
        frozen: for each cohort, whether it has stopped learning.
        load: (N,) score-weighted load of training examples of the newest experience, by which copies choose
            whom they copy; None where nobody copies.
        trained: (N,) load in the training of each experience since the expert's birth, on average: the share
            of routed weight in units of the fair one, 1/N; 0 for newborns. None where nothing was trained, or
            nobody asked for it (``Looks.loads``), as for the next two.
        peak: (N,) the largest of these loads.
        lives: (N,) experiences that it was trained in since its birth, or since it was recycled.
        shares: for each experience trained, the share of routed weight of each cohort of then.
        pruned: cohorts that are no candidates any more.
    """

    sizes: tuple[int, ...]
    births: tuple[int, ...]
    frozen: tuple[bool, ...]
    load: Tensor | None = None
    trained: Tensor | None = None
    peak: Tensor | None = None
    lives: Tensor | None = None
    shares: tuple[tuple[float, ...], ...] = ()
    pruned: tuple[int, ...] = ()

    @property
    def live(self) -> tuple[int, ...]:
        """Cohorts that learn."""
        return tuple(index for index, frozen in enumerate(self.frozen) if not frozen)

    def of_cohorts(self, values_N: Tensor, cohorts: Sequence[int]) -> Tensor:
        """Those of the experts of some cohorts, in their order."""
        parts = values_N.split(list(self.sizes))
        return torch.cat([parts[index] for index in cohorts]) if cohorts else values_N[:0]


@dataclass(frozen=True)
class Census:
    """The state of a run before an experience.

    Args:
        experience: index of the experience to come; so many were trained before.
        layers: its expert layers by block index.
        scores: mean score over the experiences seen, after each experience so far (row 0 left out).
        losses: mean training loss in the last pass of each experience so far, NaN where nobody kept it;
            empty where nobody asked for it.
        reference: (n,) losses of the newest training examples, each before the step on it; None without any.
        coming: (n,) losses of the next experience's first training examples under the model as it is; inf for
            a class that it cannot answer yet. None where nobody asked.
    """

    experience: int
    layers: Mapping[int, LayerCensus]
    scores: tuple[float, ...] = ()
    losses: tuple[float, ...] = ()
    reference: Tensor | None = None
    coming: Tensor | None = None

    @property
    def last_birth(self) -> int:
        """Experiences trained before the youngest cohort was born; 0 if none was born since the start."""
        return max((birth for layer in self.layers.values() for birth in layer.births), default=0)
