"""Schedules and policies: tables from census to decision, and what they refuse."""

import pytest

from cl_moe.errors import InputError
from cl_moe.growth import (
    Aged,
    AllPast,
    At,
    Census,
    EveryExperience,
    FreezePolicy,
    GrowthSchedule,
    Idle,
    LayerCensus,
    NeverFreeze,
    NeverGrow,
    PastExperts,
    PastExpertsAndRouter,
)
from cl_moe.growth.freezing import Stop


def census(experience: int) -> Census:
    return Census(experience, {0: LayerCensus(sizes=(4,), births=(0,), frozen=(False,))})


@pytest.mark.parametrize(
    ("schedule", "newborns"),
    [
        (NeverGrow(), [0, 0, 0, 0, 0]),
        (EveryExperience(3), [0, 3, 3, 3, 3]),
        (At({2: 8, 4: 1}), [0, 0, 8, 0, 1]),
        (At({"2": 8, "4": 1}), [0, 0, 8, 0, 1]),  # keys of a YAML mapping may be text
    ],
)
def test_schedules_decide_by_the_experience(schedule: GrowthSchedule, newborns: list[int]) -> None:
    assert [schedule.newborns(census(experience)) for experience in range(5)] == newborns
    assert [schedule.newborns(census(experience)) for experience in range(5)] == newborns, "no memory"


NOTHING = Stop(cohorts=False, shared_router=False, everything=False)


@pytest.mark.parametrize(
    ("policy", "at_first", "without_birth", "with_birth"),
    [
        (NeverFreeze(), NOTHING, NOTHING, NOTHING),
        (PastExperts(), NOTHING, NOTHING, Stop(cohorts=True)),
        (PastExpertsAndRouter(), NOTHING, NOTHING, Stop(cohorts=True, shared_router=True)),
        (AllPast(), NOTHING, Stop(True, True, True), Stop(True, True, True)),
    ],
)
def test_policies_decide_by_age_and_births(
    policy: FreezePolicy, at_first: Stop, without_birth: Stop, with_birth: Stop
) -> None:
    assert policy.decide(census(0), newborns=0) == at_first
    assert policy.decide(census(2), newborns=0) == without_birth
    assert policy.decide(census(2), newborns=5) == with_birth


@pytest.mark.parametrize(
    ("build", "key"),
    [
        (lambda: EveryExperience(0), "growth.num_experts"),
        (lambda: EveryExperience(-1), "growth.num_experts"),
        (lambda: EveryExperience(2.5), "growth.num_experts"),
        (lambda: EveryExperience(True), "growth.num_experts"),
        (lambda: EveryExperience("4"), "growth.num_experts"),
        (lambda: EveryExperience(4, init="cpoy"), "growth.init"),
        (lambda: EveryExperience(4, noise=-0.1), "growth.noise"),
        (lambda: EveryExperience(4, noise=float("nan")), "growth.noise"),
        (lambda: At({2: 0}), "growth.events.2"),
        (lambda: At({2: 1.5}), "growth.events.2"),
        (lambda: At({1.5: 2}), "growth.events"),
        (lambda: At({"soon": 2}), "growth.events"),
        (lambda: At({2: 4}, init="zero"), "growth.init"),
        (lambda: At({2: 4}, noise=-1.0), "growth.noise"),
    ],
)
def test_what_cannot_be_is_refused_at_once(build: object, key: str) -> None:
    with pytest.raises(InputError) as caught:
        build()  # type: ignore[operator]
    assert caught.value.key == key


@pytest.mark.parametrize("events", [{}, {0: 4}, {5: 4}, {2: 4, -1: 4}])
def test_events_outside_the_stream_are_refused(events: dict[int, int]) -> None:
    with pytest.raises(InputError) as caught:
        At(events).check(num_experiences=5)
    assert caught.value.key == "growth.events"


def test_events_inside_the_stream_are_fine() -> None:
    At({1: 4, 4: 4}).check(num_experiences=5)
    EveryExperience(4).check(num_experiences=1)
    NeverGrow().check(num_experiences=1)


def layer(*shares: tuple[float, ...], frozen: tuple[bool, ...] = (False, False)) -> LayerCensus:
    return LayerCensus(sizes=(4, 4), births=(0, 1), frozen=frozen, shares=shares)


EVEN, LOPSIDED = (0.5, 0.5), (0.96, 0.04)


@pytest.mark.parametrize(
    ("found", "newborns", "stopped"),
    [
        (layer((1.0,), EVEN, LOPSIDED), 0, ()),  # idle in one experience only
        (layer((1.0,), LOPSIDED, LOPSIDED), 0, (1,)),
        (layer((1.0,), LOPSIDED, EVEN), 0, ()),
        (layer((1.0,), LOPSIDED), 0, ()),  # younger than that
        (layer((1.0,), LOPSIDED, LOPSIDED, frozen=(False, True)), 0, ()),  # it is frozen already
        (layer((1.0,), LOPSIDED, LOPSIDED, frozen=(True, False)), 0, ()),  # the last that learns goes on
        (layer((1.0,), LOPSIDED, LOPSIDED, frozen=(True, False)), 2, (1,)),
        (layer(), 2, ()),
    ],
)
def test_idle_cohorts_stop(found: LayerCensus, newborns: int, stopped: tuple[int, ...]) -> None:
    stop = Idle(threshold=0.1, patience=2).decide(Census(4, {0: found, 3: layer(EVEN, EVEN)}), newborns)
    assert stop == Stop(only={0: stopped} if stopped else {})


@pytest.mark.parametrize(
    ("experience", "newborns", "stopped"), [(1, 0, ()), (2, 0, (0,)), (3, 0, (0,)), (3, 1, (0, 1))]
)
def test_old_cohorts_stop_but_not_the_last(experience: int, newborns: int, stopped: tuple[int, ...]) -> None:
    stop = Aged(age=2).decide(Census(experience, {0: layer()}), newborns)
    assert stop == Stop(only={0: stopped} if stopped else {})


@pytest.mark.parametrize(
    ("build", "key"),
    [
        (lambda: Aged(0), "freeze.age"),
        (lambda: Idle(threshold=0), "freeze.threshold"),
        (lambda: Idle(patience=1.5), "freeze.patience"),
    ],
)
def test_policies_refuse_what_cannot_be(build: object, key: str) -> None:
    with pytest.raises(InputError) as caught:
        build()  # type: ignore[operator]
    assert caught.value.key == key
