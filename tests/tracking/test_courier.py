"""Patience with a store: bounded time for one that is away or slow, and none lost when it is back."""

from __future__ import annotations

import pytest

from cl_moe.tracking.colours import colour
from cl_moe.tracking.courier import SLOW, Backoff


class Time:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def time() -> Time:
    return Time()


def wait(backoff: Backoff, time: Time) -> float:
    """Seconds until it is due, to a hundredth."""
    began = time.now
    while not backoff.due():
        time.now += 0.01
    return round(time.now - began, 1)


def test_pauses_double_up_to_ten_minutes_and_begin_anew(time: Time) -> None:
    backoff = Backoff(time)
    assert backoff.due()
    for expected in (10, 20, 40, 80, 160, 320, 600, 600):
        backoff.failed(0.0)
        assert wait(backoff, time) == pytest.approx(expected, abs=0.11)
    backoff.worked(0.1)
    assert backoff.due()
    backoff.failed(0.0)
    assert wait(backoff, time) == pytest.approx(10, abs=0.11)


@pytest.mark.parametrize("cost", [0.0, 2.6, 20.0, 60.0])
@pytest.mark.parametrize("works", [False, True])
def test_a_bounded_share_of_the_time(cost: float, works: bool, time: Time) -> None:
    if works and cost < SLOW:
        pytest.skip("a quick store may be asked at every step")
    backoff, spent, began = Backoff(time), 0.0, time.now
    while time.now < began + 12 * 3600:
        time.now += 1.0  # training
        if backoff.due():
            time.now += cost
            spent += cost
            (backoff.worked if works else backoff.failed)(cost)
    assert spent <= cost + (time.now - began) / 20


def test_a_quick_store_is_asked_every_time(time: Time) -> None:
    backoff = Backoff(time)
    for _ in range(5):
        backoff.worked(SLOW)
        assert backoff.due()


def test_colours_are_stable_and_apart() -> None:
    assert colour("naive") == colour("naive")
    assert colour("naive").startswith("#")
    assert len({colour(f"arm {i}") for i in range(100)}) == 9
