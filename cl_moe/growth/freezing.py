"""Freeze policies: what stops learning before an experience (FORMULAS 6). Pure decisions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

from cl_moe.growth.census import Census


class Stop(NamedTuple):
    """What is to stop, of what exists before the experience.

    Args:
        cohorts: every cohort, with its router keys.
        shared_router: what the router shares between cohorts: query net, its running statistics.
        everything: the trunk and the head's rows as well.
    """

    cohorts: bool = False
    shared_router: bool = False
    everything: bool = False


class FreezePolicy(ABC):
    """Decides before each experience what stops learning for good."""

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
