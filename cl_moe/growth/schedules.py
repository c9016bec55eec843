"""Growth schedules: how many experts are born before an experience. Pure decisions."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping

from cl_moe.errors import InputError
from cl_moe.growth.census import Census
from cl_moe.layers.expert_layer import GROWTH_INITS

_EVENTS = "{experience: experts}, e.g. {2: 64, 4: 16}"


class GrowthSchedule(ABC):
    """Decides before each experience how many experts every expert layer grows by.

    Attributes:
        init: how newborns start: see ``ExpertLayer.grow``.
        noise: relative noise of copies.
        hidden: hidden width of the newborns; None: as their layer's first experts.
    """

    init: str = "fresh"
    noise: float = 0.0
    hidden: int | None = None

    @abstractmethod
    def newborns(self, census: Census) -> int:
        """Experts to be born in each layer before experience ``census.experience``; 0 for none."""

    @property
    @abstractmethod
    def sizes(self) -> tuple[int, ...]:
        """Sizes of the cohorts that may be born, so that a layer can refuse them before any training."""

    def check(self, num_experiences: int) -> None:
        """Refuse a schedule that a stream of this length cannot follow."""
        return None


class NeverGrow(GrowthSchedule):
    """The model keeps its size."""

    def newborns(self, census: Census) -> int:
        """Always 0."""
        return 0

    @property
    def sizes(self) -> tuple[int, ...]:
        """None."""
        return ()


class EveryExperience(GrowthSchedule):
    """A cohort before every experience but the first.

    Args:
        num_experts: size of each cohort.
        init: ``fresh``, ``copy`` or ``zero_output``.
        noise: relative noise of copies.
        hidden: hidden width of the newborns, where the layer allows one of their own (moe); a copy needs
            experts of that width. None: as the layer's first experts.
    """

    def __init__(
        self, num_experts: int, init: str = "copy", noise: float = 0.01, hidden: int | None = None
    ) -> None:
        self.num_experts = _positive(num_experts, "growth.num_experts")
        self.init, self.noise = _birth(init, noise)
        self.hidden = _width(hidden)

    def newborns(self, census: Census) -> int:
        """``num_experts``, but 0 before the first experience."""
        return self.num_experts if census.experience > 0 else 0

    @property
    def sizes(self) -> tuple[int, ...]:
        """Always the same."""
        return (self.num_experts,)


class At(GrowthSchedule):
    """Cohorts before chosen experiences.

    Args:
        events: ``{experience index: experts}``, indices from 1; None (as in the YAML) fails ``check``.
        init: ``fresh``, ``copy`` or ``zero_output``.
        noise: relative noise of copies.
        hidden: hidden width of the newborns, as in ``EveryExperience``.
    """

    def __init__(
        self,
        events: Mapping[int, int] | None,
        init: str = "copy",
        noise: float = 0.01,
        hidden: int | None = None,
    ) -> None:
        if events is not None and not isinstance(events, Mapping):
            raise InputError(got=f"{events!r}", allowed=_EVENTS, key="growth.events")
        given = {} if events is None else events
        self.events = {_index(at): _positive(count, f"growth.events.{at}") for at, count in given.items()}
        self.init, self.noise = _birth(init, noise)
        self.hidden = _width(hidden)

    def newborns(self, census: Census) -> int:
        """What ``events`` says for this experience."""
        return self.events.get(census.experience, 0)

    @property
    def sizes(self) -> tuple[int, ...]:
        """In order of the events."""
        return tuple(count for _, count in sorted(self.events.items()))

    def check(self, num_experiences: int) -> None:
        """There must be events, each before an experience that exists, and not before the first."""
        if not self.events:
            raise InputError(got="no events", allowed=_EVENTS, key="growth.events")
        outside = [at for at in self.events if not 1 <= at < num_experiences]
        if outside:
            raise InputError(
                got=f"growth before experience {outside[0]}",
                allowed=f"1 .. {num_experiences - 1}: the stream has {num_experiences} experiences, from 0",
                key="growth.events",
            )


def _positive(count: int, key: str) -> int:
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise InputError(
            got=f"{count!r} experts", allowed="a whole number, at least 1 (growth=never for none)", key=key
        )
    return count


def _width(hidden: int | None) -> int | None:
    if hidden is not None and (not isinstance(hidden, int) or isinstance(hidden, bool) or hidden < 1):
        raise InputError(
            got=f"hidden={hidden!r}", allowed="a whole number, at least 1, or null", key="growth.hidden"
        )
    return hidden


def _index(at: int | str) -> int:
    if isinstance(at, int) or (isinstance(at, str) and at.isdecimal()):
        return int(at)
    raise InputError(got=f"growth before experience {at!r}", allowed="a whole number", key="growth.events")


def _birth(init: str, noise: float) -> tuple[str, float]:
    if init not in GROWTH_INITS:
        raise InputError(got=f"init={init!r}", allowed=" or ".join(GROWTH_INITS), key="growth.init")
    if not isinstance(noise, int | float) or not 0 <= noise < math.inf:
        raise InputError(got=f"noise={noise!r}", allowed="a number >= 0", key="growth.noise")
    return init, noise
