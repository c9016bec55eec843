"""How often intervals hold the truth and tests reject it, where runs share orders and seeds.

Legend: O orders, S seeds, M samples.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from cl_moe.tracking.compare.statistics import (
    Inference,
    contrast,
    level_means,
    sign_flip_test,
    student_interval,
    student_p,
)

Shape = tuple[int, int]
QUICK = Inference(resamples=300)
Cells = dict[tuple[int, int], float]


def drawn(random: np.random.Generator, shape: Shape, spreads: tuple[float, float, float]) -> Cells:
    """Differences of mean 0 in a grid of so many orders and seeds, which have effects, alone and together."""
    order, seed, rest = spreads
    y_OS = order * random.normal(size=(shape[0], 1)) + seed * random.normal(size=(1, shape[1]))
    y_OS = y_OS + rest * random.normal(size=shape)
    return {place: float(y_OS[place]) for place in np.ndindex(shape)}


def rates(shape: Shape, spreads: tuple[float, float, float], M: int = 300) -> tuple[float, float]:
    """The shares of samples whose shown interval holds 0, and whose p is at most .05."""
    random = np.random.default_rng(shape)
    held = rejected = 0
    for _ in range(M):
        cells = drawn(random, shape, spreads)
        one = contrast(cells, dict.fromkeys(cells, 0.0), QUICK)
        held += one.shown.low <= 0 <= one.shown.high
        rejected += one.p <= 0.05
    return held / M, rejected / M


@pytest.mark.parametrize("pairs", [2, 3, 4, 6])
def test_intervals_of_few_pairs_hold_the_truth_as_often_as_they_say(pairs: int) -> None:
    held, rejected = rates((1, pairs), (0, 0, 1))
    assert 0.9 < held <= 1  # 95%, three standard errors of 300 samples below, and some
    assert rejected < 0.09


@pytest.mark.parametrize("shape", [(2, 2), (5, 3), (8, 8)])
@pytest.mark.parametrize("spreads", [(1.0, 1.0, 0.1), (1.0, 0.0, 0.1), (0.0, 0.0, 1.0)])
def test_shared_orders_and_seeds_are_no_evidence(shape: Shape, spreads: tuple[float, float, float]) -> None:
    held, rejected = rates(shape, spreads, 200)
    assert held > 0.9
    assert rejected < 0.09


def test_signs_of_one_axis_would_reject_too_often() -> None:
    """Why p of a grid is Student's: what orders and seeds vary is in neither axis whole."""
    random = np.random.default_rng(1)
    samples = [drawn(random, (14, 14), (1, 1, 0.1)) for _ in range(200)]
    larger = [max(sign_flip_test(axis, 200) for axis in level_means(cells)) for cells in samples]
    held = [low <= 0 <= high for low, high in map(student_interval, samples)]
    assert np.mean([p <= 0.05 for p in larger]) > 0.09
    assert np.mean(held) > 0.93  # its p is that of this interval


def test_runs_taken_for_independent_would_reject_too_often() -> None:
    """What the means of levels are for: the same samples, all fifteen signs by themselves."""
    random = np.random.default_rng(0)
    samples = [drawn(random, (5, 3), (1, 1, 0.5)) for _ in range(100)]
    naive = [sign_flip_test(list(cells.values())) <= 0.05 for cells in samples]
    assert np.mean(naive) > 0.15


def test_level_means_against_numpy() -> None:
    y_OS = np.random.default_rng(2).normal(size=(3, 4))
    cells = {place: float(y_OS[place]) for place in np.ndindex(3, 4) if place != (1, 2)}
    y_OS[1, 2] = math.nan
    orders, seeds = level_means(cells)
    np.testing.assert_allclose(orders, np.nanmean(y_OS, axis=1))
    np.testing.assert_allclose(seeds, np.nanmean(y_OS, axis=0))
    one_to_one = {(k, k): float(k) for k in range(4)}
    assert level_means(one_to_one) == [[0.0, 1.0, 2.0, 3.0]]


@pytest.mark.parametrize("shape", [(1, 6), (4, 1), (3, 5)])
def test_students_p_ends_its_interval_at_zero(shape: Shape) -> None:
    y_OS = 0.7 + np.random.default_rng(3).normal(size=shape)
    cells = {place: float(y_OS[place]) for place in np.ndindex(*shape)}
    p = student_p(cells)
    if min(shape) == 1:
        np.testing.assert_allclose(p, stats.ttest_1samp(y_OS.ravel(), 0).pvalue)
    else:
        assert contrast(cells, dict.fromkeys(cells, 0.0), QUICK).p == p
    assert min(map(abs, student_interval(cells, 1 - p))) < 1e-9
    assert student_p({place: -value for place, value in cells.items()}) == p


def test_students_p_where_nothing_varies() -> None:
    assert student_p({(o, s): 0.0 for o in range(2) for s in range(2)}) == 1
    assert student_p({(o, s): 1.0 for o in range(2) for s in range(2)}) < 1e-15
    assert math.isnan(student_p({(0, 0): 1.0}))


def test_students_interval_of_a_grid_is_wider_than_that_of_either_axis() -> None:
    y_OS = np.random.default_rng(5).normal(size=(4, 6))
    low, high = student_interval({place: float(y_OS[place]) for place in np.ndindex(4, 6)}, 0.9)
    halves = [stats.t.ppf(0.95, len(m) - 1) * stats.sem(m) for m in (y_OS.mean(0), y_OS.mean(1))]
    np.testing.assert_allclose((high - low) / 2, math.sqrt(sum(half**2 for half in halves)))
    np.testing.assert_allclose((high + low) / 2, y_OS.mean())
