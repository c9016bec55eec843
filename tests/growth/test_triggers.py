"""Growth that the training data ask for: tables from census to decision, and how often a test errs."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from cl_moe.errors import InputError
from cl_moe.growth import Census, EveryK, LayerCensus, OnDrift, OnPlateau, OnSaturation
from cl_moe.growth.triggers import higher
from cl_moe.seeds import generator

LAYER = LayerCensus(sizes=(4,), births=(0,), frozen=(False,))


def drifting(old: Tensor, new: Tensor) -> Census:
    return Census(3, {0: LAYER}, reference=old, coming=new)


def draws(number: int, purpose: str, shift: float = 0.0) -> Tensor:
    return torch.randn(64, generator=generator(0, purpose, number), dtype=torch.float64) + shift


def test_every_k_counts_from_the_start() -> None:
    schedule = EveryK(2, k=3)
    assert [schedule.newborns(Census(index, {})) for index in range(8)] == [0, 0, 0, 2, 0, 0, 2, 0]
    schedule.check(4)
    with pytest.raises(InputError) as caught:
        schedule.check(3)
    assert caught.value.key == "growth.k"


@pytest.mark.parametrize(("num_old", "num_new"), [(3, 4), (5, 2), (4, 4)])
def test_p_is_the_share_of_all_orders_that_are_as_extreme(num_old: int, num_new: int) -> None:
    values = torch.randn(num_old + num_new, generator=generator(0, "values", num_old), dtype=torch.float64)
    old, new = values[:num_old], values[num_old:]

    def above(new: Tensor, old: Tensor) -> int:
        return int((new[:, None] > old[None, :]).sum())

    orders = list(itertools.combinations(range(len(values)), num_new))
    kept = [[i for i in range(len(values)) if i not in chosen] for chosen in orders]
    found = [above(values[list(c)], values[k]) for c, k in zip(orders, kept, strict=True)]
    p, effect = higher(new, old)
    assert p == pytest.approx(sum(u >= above(new, old) for u in found) / len(orders))
    assert effect == pytest.approx(above(new, old) / (num_old * num_new))


def test_a_stationary_stream_raises_no_more_alarms_than_the_level_says() -> None:
    schedule, number = OnDrift(2, level=0.05, samples=64, effect=0.5), 600
    found = [schedule.newborns(drifting(draws(i, "old"), draws(i, "new"))) for i in range(number)]
    alarms = sum(born > 0 for born in found)
    spread = math.sqrt(number * 0.05 * 0.95)
    assert abs(alarms - number * 0.05) < 3 * spread, "a test that never or too often alarms"


def test_a_planted_drift_is_found_and_a_fall_of_the_loss_is_none() -> None:
    schedule = OnDrift(2)
    found = [schedule.newborns(drifting(draws(i, "old"), draws(i, "new", 1.5))) for i in range(40)]
    assert found == [2] * 40
    found = [schedule.newborns(drifting(draws(i, "old"), draws(i, "new", -1.5))) for i in range(40)]
    assert found == [0] * 40


def test_an_effect_can_be_asked_for_beside_significance() -> None:
    old, new = (torch.randn(4000, generator=generator(0, word)) for word in ("old", "new"))
    census = drifting(old, new + 0.15)
    assert OnDrift(2, samples=4000, effect=0.5).newborns(census) == 2
    assert OnDrift(2, samples=4000, effect=0.6).newborns(census) == 0


def test_a_class_without_a_column_is_drift_and_is_ranked_like_any_loss() -> None:
    unknown = torch.full((32,), math.inf)
    decision = OnDrift(2).decide(drifting(draws(0, "old"), unknown))
    assert decision.num_experts == 2
    assert decision.more["effect"] == 1.0
    mixed = torch.cat([draws(0, "new")[:30], unknown[:2]])
    assert OnDrift(2).newborns(drifting(draws(0, "old"), mixed)) == 0
    assert OnDrift(2).decide(drifting(unknown, unknown)).statistic == 1.0, "nothing to tell apart"


def test_without_losses_on_both_sides_nothing_is_decided() -> None:
    for census in (Census(3, {0: LAYER}), drifting(draws(0, "old"), torch.zeros(0))):
        decision = OnDrift(2).decide(census)
        assert (decision.num_experts, decision.measure) == (0, "")


@pytest.mark.parametrize(
    ("losses", "births", "born"),
    [
        ([2.0, 1.0, 1.0], (0,), 0),  # too few to tell
        ([2.0, 1.0, 1.0, 1.0], (0,), 2),
        ([2.0, 1.0, 0.9, 0.8], (0,), 0),  # it falls
        ([2.0, 1.0, 1.2, 0.99], (0,), 2),  # by too little
        ([2.0, 1.0, math.nan, 1.0, 1.0], (0,), 2),  # an experience of no example
        ([2.0, 1.0, 1.0, 1.0], (0, 2), 0),  # counted from the last birth
        ([0.2, 0.1, 0.1, 0.1], (0,), 0),  # good enough
        ([0.0, 0.0, 0.0, 0.0], (0,), 0),
    ],
)
def test_a_plateau_is_a_loss_that_stands_still_above_its_target(losses, births, born) -> None:
    layer = LayerCensus(sizes=(4,) * len(births), births=births, frozen=(False,) * len(births))
    census = Census(len(losses), {0: layer}, losses=tuple(losses))
    assert OnPlateau(2, patience=2, improvement=0.02, target=0.5).newborns(census) == born


@pytest.mark.parametrize(
    ("measure", "load", "statistic"),
    [
        ("effective", [1.0, 1.0, 1.0, 1.0], 1.0),
        ("effective", [2.0, 2.0, 0.0, 0.0], 0.5),
        ("usage", [3.9, 0.1, 0.0, 0.0], 0.5),
        ("alive", [3.9, 0.05, 0.05, 0.0], 0.25),
        ("effective", [4.0, 0.0, 0.0, 0.0], 0.25),
    ],
)
def test_saturation_is_the_share_of_experts_that_are_used(measure, load, statistic) -> None:
    layer = LayerCensus((4,), (0,), (False,), trained=torch.tensor(load, dtype=torch.float64))
    decision = OnSaturation(2, measure=measure, threshold=0.9).decide(Census(2, {0: layer}))
    assert decision.statistic == pytest.approx(statistic)
    assert decision.num_experts == (2 if statistic >= 0.9 else 0)


def test_newborns_and_frozen_experts_are_no_part_of_what_is_used_up() -> None:
    even = torch.ones(6, dtype=torch.float64)
    fresh = torch.tensor([1.5, 1.5, 1.5, 1.5, 0.0, 0.0], dtype=torch.float64)
    for trained, frozen, born in ((even, (False, False), 2), (fresh, (False, False), 0)):
        layer = LayerCensus((4, 2), (0, 2), frozen, trained=trained)
        assert OnSaturation(2, threshold=0.9).newborns(Census(2, {0: layer})) == born
    lopsided = torch.tensor([6.0, 0.0, 0.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    layer = LayerCensus((4, 2), (0, 2), (True, False), trained=lopsided)
    assert OnSaturation(2, threshold=0.9).newborns(Census(2, {0: layer})) == 2
    assert OnSaturation(2).newborns(Census(2, {0: LAYER})) == 0, "nobody has trained yet"


@pytest.mark.parametrize(
    ("build", "key"),
    [
        (lambda: EveryK(2, k=0), "growth.k"),
        (lambda: EveryK(0, k=2), "growth.num_experts"),
        (lambda: OnDrift(2, level=0), "growth.level"),
        (lambda: OnDrift(2, level=1.0), "growth.level"),
        (lambda: OnDrift(2, samples=4), "growth.samples"),
        (lambda: OnDrift(2, effect=0.4), "growth.effect"),
        (lambda: OnDrift(2, init="cpoy"), "growth.init"),
        (lambda: OnPlateau(2, patience=0), "growth.patience"),
        (lambda: OnPlateau(2, improvement=-0.1), "growth.improvement"),
        (lambda: OnPlateau(2, target=math.nan), "growth.target"),
        (lambda: OnSaturation(2, measure="entropy"), "growth.measure"),
        (lambda: OnSaturation(2, threshold=1.5), "growth.threshold"),
    ],
)
def test_what_cannot_be_is_refused_at_once(build, key: str) -> None:
    with pytest.raises(InputError) as caught:
        build()
    assert caught.value.key == key
