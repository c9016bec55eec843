"""What a growth schedule and a freeze policy may see: the past, never test data of the future."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LayerCensus:
    """One expert layer before an experience.

    Args:
        sizes: experts per cohort, oldest first.
        births: for each cohort, the number of experiences trained before its birth.
        frozen: for each cohort, whether it has stopped learning.
        load: (N,) score-weighted load on the data of the experiences seen; None before the first.
    """

    sizes: tuple[int, ...]
    births: tuple[int, ...]
    frozen: tuple[bool, ...]
    load: Tensor | None = None


@dataclass(frozen=True)
class Census:
    """The state of a run before an experience.

    Args:
        experience: index of the experience to come; so many were trained before.
        layers: its expert layers by block index.
        scores: mean score over the experiences seen, after each experience so far (row 0 left out).
    """

    experience: int
    layers: Mapping[int, LayerCensus]
    scores: tuple[float, ...] = ()
