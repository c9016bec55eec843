"""Freeze policies: what stops learning before an experience (FORMULAS 6). Pure decisions."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from cl_moe.errors import InputError
from cl_moe.growth.census import Census, LayerCensus
from cl_moe.growth.trace import Looks


class Stop(NamedTuple):
    """What is to stop, of what exists before the experience.

    Args:
        cohorts: every cohort, with its router keys.
        shared_router: what the router shares between cohorts: query net, its running statistics.
        everything: the trunk and the head's rows as well.
        only: without ``cohorts``, some of them: indices of cohorts by layer.
    """

    cohorts: bool = False
    shared_router: bool = False
    everything: bool = False
    only: Mapping[int, Sequence[int]] = {}


class FreezePolicy(ABC):
    """Decides before each experience what stops learning for good.

    Attributes:
        looks: what it wants to see in the census beside shapes, ages, loads and scores.
    """

    looks: Looks = Looks()

    @abstractmethod
    def decide(self, census: Census, newborns: int) -> Stop:
        """What stops before ``census.experience``, given that ``newborns`` experts are about to be born."""


class NeverFreeze(FreezePolicy):
    """Everything goes on learning."""

    def decide(self, census: Census, newborns: int) -> Stop:
        """Nothing."""
        return Stop()


class PastExperts(FreezePolicy):
    """Cohorts stop, with their router keys, when a younger cohort is born."""

    def decide(self, census: Census, newborns: int) -> Stop:
        """All cohorts so far, if experts are born; nothing otherwise, so that some expert always learns."""
        return Stop(cohorts=newborns > 0)


class PastExpertsAndRouter(FreezePolicy):
    """As ``PastExperts``, and what the router shares between cohorts stops at the first birth."""

    def decide(self, census: Census, newborns: int) -> Stop:
        """All cohorts so far and the shared router, if experts are born."""
        return Stop(cohorts=newborns > 0, shared_router=newborns > 0)


class AllPast(FreezePolicy):
    """Everything that existed before an experience stops: trunk, experts, routers, old classes' head rows."""

    def decide(self, census: Census, newborns: int) -> Stop:
        """Everything, from the second experience on."""
        past = census.experience > 0
        return Stop(cohorts=past, shared_router=past, everything=past)


class Aged(FreezePolicy):
    """Cohorts stop, with their router keys, at an age; the last that learns goes on till another is born.

    Args:
        age: experiences that a cohort is trained on, at least 1.
    """

    def __init__(self, age: int = 2) -> None:
        self.age = _count("age", age)

    def decide(self, census: Census, newborns: int) -> Stop:
        """Cohorts that were trained on ``age`` experiences."""
        old = {
            index: [c for c in layer.live if census.experience - layer.births[c] >= self.age]
            for index, layer in census.layers.items()
        }
        return _stop(census, old, newborns)


class Idle(FreezePolicy):
    """Cohorts stop, with their router keys, when nobody has needed them for a while (FORMULAS 6).

    What they know of earlier experiences is then safe, and they cost no gradient. The last cohort of a layer
    that learns goes on till another is born. Loads are those of training: no test data are looked at.

    Args:
        threshold: of a cohort's share of the routed weight, in units of its fair share (its part of the
            layer's experts): below it, a cohort is idle; > 0.
        patience: experiences in a row, trained since its birth, in which it was idle; at least 1.
    """

    looks = Looks(loads=True)

    def __init__(self, threshold: float = 0.1, patience: int = 2) -> None:
        number = isinstance(threshold, int | float) and not isinstance(threshold, bool)
        if not number or not 0 < threshold < math.inf:
            raise InputError(
                got=f"threshold={threshold!r}", allowed="a number above 0", key="freeze.threshold"
            )
        self.threshold, self.patience = threshold, _count("patience", patience)

    def decide(self, census: Census, newborns: int) -> Stop:
        """Cohorts that were idle in each of the last ``patience`` experiences."""
        idle = {
            index: [c for c in layer.live if self._is_idle(layer, c)]
            for index, layer in census.layers.items()
        }
        return _stop(census, idle, newborns)

    def _is_idle(self, layer: LayerCensus, cohort: int) -> bool:
        recent = layer.shares[-self.patience :]
        if len(recent) < self.patience or any(len(row) <= cohort for row in recent):
            return False
        fair = [layer.sizes[cohort] / sum(layer.sizes[: len(row)]) for row in recent]
        return all(row[cohort] < self.threshold * part for row, part in zip(recent, fair, strict=True))


def _stop(census: Census, chosen: Mapping[int, list[int]], newborns: int) -> Stop:
    """Stop these cohorts; of each layer's live ones the youngest stays, if none is born."""
    only = {}
    for index, cohorts in chosen.items():
        everyone = len(cohorts) == len(census.layers[index].live)
        kept = cohorts[:-1] if everyone and not newborns else cohorts
        if kept:
            only[index] = tuple(kept)
    return Stop(only=only)


def _count(name: str, value: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        allowed = "a whole number, at least 1"
        raise InputError(got=f"{name}={value!r}", allowed=allowed, key=f"freeze.{name}")
    return value
