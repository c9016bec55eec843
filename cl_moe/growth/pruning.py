"""Prune policies: which experts start anew and which cohorts nobody may choose any more. Pure decisions."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cl_moe.errors import InputError
from cl_moe.growth.census import Census, LayerCensus
from cl_moe.growth.trace import Looks
from cl_moe.layers.expert_layer import GROWTH_INITS


class Removal(NamedTuple):
    """What ends before an experience.

    Args:
        experts: ids by layer, of experts that start anew under their old ids; of live cohorts only.
        cohorts: indices by layer, of cohorts that are no candidates any more.
    """

    experts: Mapping[int, Sequence[int]] = {}
    cohorts: Mapping[int, Sequence[int]] = {}


class PrunePolicy(ABC):
    """Decides before each experience what ends, the opposite of growth.

    Attributes:
        looks: what it wants to see in the census beside shapes, ages, loads and scores.
        init: how recycled experts start: see ``ExpertLayer.grow``.
        noise: relative noise of copies.
        recycles: whether it ever lets experts start anew, which not every layer can.
    """

    looks: Looks = Looks()
    init: str = "fresh"
    noise: float = 0.0
    recycles: bool = False

    @abstractmethod
    def decide(self, census: Census) -> Removal:
        """What ends before ``census.experience``."""


class NeverPrune(PrunePolicy):
    """Nothing ends."""

    def decide(self, census: Census) -> Removal:
        """Nothing."""
        return Removal()


class RecycleDead(PrunePolicy):
    """Experts that nobody ever needed start anew in their place: weights, router keys, optimizer state.

    Dead is an expert whose load stayed below ``threshold`` in the training of every experience since its
    birth, or since it last started anew, at least ``patience`` of them. It keeps its id: it served nobody, so
    nobody meets another under its name. Experts of frozen cohorts are never touched. As in continual
    backprop (Dohare et al. 2024, 2306.13812) and ReDo (Sokar et al. 2023, 2302.12902), which do so with
    hidden units, and by their use.

    Args:
        threshold: of an expert's load, in units of the fair one, 1/N; > 0.
        patience: experiences, at least 1.
        init: ``fresh``, ``copy`` (of the most used) or ``zero_output``.
        noise: relative noise of copies.
    """

    looks = Looks(loads=True)
    recycles = True

    def __init__(
        self, threshold: float = 0.1, patience: int = 1, init: str = "fresh", noise: float = 0.01
    ) -> None:
        self.threshold, self.patience = _checked(threshold, patience)
        if init not in GROWTH_INITS:
            raise InputError(got=f"init={init!r}", allowed=" or ".join(GROWTH_INITS), key="prune.init")
        if not isinstance(noise, int | float) or not 0 <= noise < math.inf:
            raise InputError(got=f"noise={noise!r}", allowed="a number >= 0", key="prune.noise")
        self.init, self.noise = init, noise

    def decide(self, census: Census) -> Removal:
        """The dead experts of cohorts that learn."""
        found = {index: self._dead(layer) for index, layer in census.layers.items()}
        return Removal(experts={index: experts for index, experts in found.items() if experts})

    def _dead(self, layer: LayerCensus) -> tuple[int, ...]:
        if layer.peak is None or layer.lives is None:
            return ()
        dead_N = (layer.peak < self.threshold) & (layer.lives >= self.patience)
        live_N = _of_live(layer, dead_N)
        return tuple((dead_N & live_N).nonzero().flatten().tolist())


class PruneIdle(PrunePolicy):
    """Cohorts that nobody ever needed are candidates no more: no key of theirs takes a slot.

    Idle is a cohort whose share of the routed weight stayed below ``threshold`` of its fair one in the
    training of every experience since its birth, at least ``patience`` of them. Weights and ids stay as they
    are, frozen, so that every earlier routing can still be computed. Of each layer the cohort with the
    largest share goes on, and so does the last that learns.

    Args:
        threshold: of a cohort's share, in units of its part of the layer's experts; > 0.
        patience: experiences, at least 1.
    """

    looks = Looks(loads=True)

    def __init__(self, threshold: float = 0.05, patience: int = 2) -> None:
        self.threshold, self.patience = _checked(threshold, patience)

    def decide(self, census: Census) -> Removal:
        """The idle cohorts."""
        found = {index: self._idle(layer) for index, layer in census.layers.items()}
        return Removal(cohorts={index: cohorts for index, cohorts in found.items() if cohorts})

    def _idle(self, layer: LayerCensus) -> tuple[int, ...]:
        idle = [cohort for cohort in range(len(layer.sizes)) if self._is_idle(layer, cohort)]
        if layer.live and set(layer.live) <= {*idle}:
            idle.remove(layer.live[-1])
        return tuple(cohort for cohort in idle if cohort not in layer.pruned)

    def _is_idle(self, layer: LayerCensus, cohort: int) -> bool:
        life = [row for row in layer.shares if len(row) > cohort]
        if len(life) < self.patience or max(life[-1]) == life[-1][cohort]:
            return False
        fair = [layer.sizes[cohort] / sum(layer.sizes[: len(row)]) for row in life]
        return all(row[cohort] < self.threshold * part for row, part in zip(life, fair, strict=True))


def _of_live(layer: LayerCensus, like_N: Tensor) -> Tensor:
    """(N,) bool: whether an expert's cohort learns."""
    live_N = torch.zeros_like(like_N, dtype=torch.bool)
    for cohort in layer.live:
        first = sum(layer.sizes[:cohort])
        live_N[first : first + layer.sizes[cohort]] = True
    return live_N


def _checked(threshold: float, patience: int) -> tuple[float, int]:
    number = isinstance(threshold, int | float) and not isinstance(threshold, bool)
    if not number or not 0 < threshold < math.inf:
        raise InputError(got=f"threshold={threshold!r}", allowed="a number above 0", key="prune.threshold")
    if not isinstance(patience, int) or isinstance(patience, bool) or patience < 1:
        allowed = "a whole number, at least 1"
        raise InputError(got=f"patience={patience!r}", allowed=allowed, key="prune.patience")
    return float(threshold), patience
