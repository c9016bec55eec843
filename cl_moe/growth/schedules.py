"""Growth schedules: how many experts are born before an experience. Pure decisions."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from cl_moe.errors import InputError
from cl_moe.growth.budget import GrowthBudget
from cl_moe.growth.census import Census
from cl_moe.growth.trace import Looks
from cl_moe.layers.expert_layer import GROWTH_INITS

_EVENTS = "{experience: experts}, e.g. {2: 64, 4: 16}"


class Decision(NamedTuple):
    """What a schedule says, and by what.

    Args:
        num_experts: to be born in each layer; 0 for none.
        measure: what was looked at, for people and for metric keys (``growth/<measure>_statistic``); empty
            where the calendar decides, or nothing could be told.
        statistic: its value.
        threshold: what it was held against.
        more: further numbers by name.
    """

    num_experts: int
    measure: str = ""
    statistic: float = math.nan
    threshold: float = math.nan
    more: Mapping[str, float] = {}


@dataclass(frozen=True)
class Birth:
    """How newborns start, and how large they may make a model.

    Args:
        init: see ``ExpertLayer.grow``.
        noise: relative noise of copies.
        hidden: hidden width of the newborns; None: as their layer's first experts.
        budget: bounds on the model's size.
    """

    init: str = "fresh"
    noise: float = 0.0
    hidden: int | None = None
    budget: GrowthBudget = field(default_factory=GrowthBudget)

    @classmethod
    def of(
        cls, num_experts: int, init: str, noise: float, hidden: int | None, budget: GrowthBudget | None
    ) -> tuple[int, Birth]:
        """The size of a cohort and how it is born, checked."""
        count = _positive(num_experts, "growth.num_experts")
        return count, cls(*_birth(init, noise), _width(hidden), budget or GrowthBudget())


class GrowthSchedule(ABC):
    """Decides before each experience how many experts every expert layer grows by.

    Attributes:
        birth: how newborns start.
    """

    birth: Birth = Birth()

    @property
    def looks(self) -> Looks:
        """What it wants to see in the census beside shapes, ages, loads and scores; by default nothing."""
        return Looks()

    @property
    def planned(self) -> bool:
        """Whether it is known before any training when experts will be born."""
        return True

    @abstractmethod
    def newborns(self, census: Census) -> int:
        """Experts to be born in each layer before experience ``census.experience``; 0 for none."""

    def decide(self, census: Census) -> Decision:
        """The same, with what it was decided by."""
        return Decision(self.newborns(census))

    @property
    @abstractmethod
    def sizes(self) -> tuple[int, ...]:
        """Sizes of the cohorts that may be born, so that a layer can refuse them before any training."""

    def most(self, num_experiences: int) -> list[int]:
        """The most that may be born before each experience, budgets aside."""
        return [self.newborns(Census(index, {})) for index in range(num_experiences)]

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
        budget: how large the model may become; None: any size.
    """

    def __init__(
        self,
        num_experts: int,
        init: str = "copy",
        noise: float = 0.01,
        hidden: int | None = None,
        budget: GrowthBudget | None = None,
    ) -> None:
        self.num_experts, self.birth = Birth.of(num_experts, init, noise, hidden, budget)

    def newborns(self, census: Census) -> int:
        """``num_experts``, but 0 before the first experience."""
        return self.num_experts if census.experience > 0 else 0

    @property
    def sizes(self) -> tuple[int, ...]:
        """Always the same."""
        return (self.num_experts,)


class EveryK(GrowthSchedule):
    """A cohort before every k-th experience: before those with index k, 2 k, 3 k and so on.

    Args:
        num_experts: size of each cohort.
        k: at least 1, which is ``EveryExperience``; at most the stream's last index.
        init: ``fresh``, ``copy`` or ``zero_output``.
        noise: relative noise of copies.
        hidden: hidden width of the newborns, as in ``EveryExperience``.
        budget: how large the model may become; None: any size.
    """

    def __init__(
        self,
        num_experts: int,
        k: int = 2,
        init: str = "copy",
        noise: float = 0.01,
        hidden: int | None = None,
        budget: GrowthBudget | None = None,
    ) -> None:
        if not isinstance(k, int) or isinstance(k, bool) or k < 1:
            raise InputError(got=f"k={k!r}", allowed="a whole number, at least 1", key="growth.k")
        self.num_experts, self.birth = Birth.of(num_experts, init, noise, hidden, budget)
        self.k = k

    def newborns(self, census: Census) -> int:
        """``num_experts`` at multiples of ``k``, but 0 before the first experience."""
        return self.num_experts if census.experience > 0 and census.experience % self.k == 0 else 0

    @property
    def sizes(self) -> tuple[int, ...]:
        """Always the same."""
        return (self.num_experts,)

    def check(self, num_experiences: int) -> None:
        """A schedule that never acts on this stream is a mistake."""
        if self.k >= num_experiences:
            raise InputError(
                got=f"k={self.k} on a stream of {num_experiences} experiences: nothing would ever be born",
                allowed=f"at most {max(num_experiences - 1, 1)}, or growth=never",
                key="growth.k",
            )


class At(GrowthSchedule):
    """Cohorts before chosen experiences.

    Args:
        events: ``{experience index: experts}``, indices from 1; None (as in the YAML) fails ``check``.
        init: ``fresh``, ``copy`` or ``zero_output``.
        noise: relative noise of copies.
        hidden: hidden width of the newborns, as in ``EveryExperience``.
        budget: how large the model may become; None: any size.
    """

    def __init__(
        self,
        events: Mapping[int, int] | None,
        init: str = "copy",
        noise: float = 0.01,
        hidden: int | None = None,
        budget: GrowthBudget | None = None,
    ) -> None:
        if events is not None and not isinstance(events, Mapping):
            raise InputError(got=f"{events!r}", allowed=_EVENTS, key="growth.events")
        given = {} if events is None else events
        self.events = {_index(at): _positive(count, f"growth.events.{at}") for at, count in given.items()}
        self.birth = Birth.of(1, init, noise, hidden, budget)[1]

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
