"""The statistics of the comparison against scipy, textbooks' formulas and laws."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from cl_moe.errors import InputError
from cl_moe.tracking.compare.statistics import (
    Inference,
    bootstrap_interval,
    contrast,
    expanded,
    holm,
    sign_flip_test,
    spread,
    student_interval,
)
from cl_moe.tracking.compare.variance import Components, components, worst_order

numbers = st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=8)
MANY = Inference(resamples=200_000)


def cells_of(values: np.ndarray) -> dict[tuple[int, int], float]:
    return {
        place: float(values[place]) for place in np.ndindex(values.shape) if not math.isnan(values[place])
    }


@given(numbers)
@settings(deadline=None)
def test_students_interval_is_the_paired_t_test(x: list[float]) -> None:
    got = student_interval({(0, k): value for k, value in enumerate(x)}, 0.9)
    if np.std(x) > 1e-6:
        low, high = stats.t.interval(0.9, len(x) - 1, np.mean(x), stats.sem(x))
        np.testing.assert_allclose(got, [low, high], rtol=1e-6, atol=1e-9)


def test_differences_without_an_interval() -> None:
    one = contrast({(0, 1): 2.0, (0, 2): 5.0}, {(0, 1): 1.5, (0, 3): 1.0}, Inference())
    assert (one.mean, one.pairs, one.p) == (0.5, 1, 1.0)
    assert all(map(math.isnan, (*one.bootstrap, *one.student)))
    none = contrast({(0, 1): 2.0}, {(0, 2): 1.0}, Inference())
    assert none.pairs == 0
    assert math.isnan(none.mean)
    assert math.isnan(none.p)


def test_the_interval_that_is_shown() -> None:
    ours, zero = {(0, s): s**2 + 1.0 for s in range(8)}, {(0, s): 0.0 for s in range(8)}
    boot, student = (contrast(ours, zero, Inference(interval=kind)) for kind in ("bootstrap", "t"))
    assert boot.shown == boot.bootstrap == student.bootstrap
    assert student.shown == student.student == boot.student
    assert boot.shown != student.shown
    assert (boot.resampled, student.resampled, boot.few) == (True, False, False)


@pytest.mark.parametrize("places", [
    [(0, s) for s in range(4)], [(k, k) for k in range(4)], [(o, s) for o in range(2) for s in range(7)],
    [(o, s) for o in range(8) for s in range(7)], [(0, 0)],
])  # fmt: skip
def test_of_few_levels_students_interval_is_shown(places: list[tuple[int, int]]) -> None:
    ours = {(o, s): o**2 + math.sin(s) for o, s in places}
    one = contrast(ours, dict.fromkeys(ours, 0.0), Inference())
    np.testing.assert_array_equal(one.shown, one.student)  # NaN of one pair
    assert one.few
    assert not one.resampled
    assert np.isnan(one.shown).all() == (len(places) == 1)


def test_spread_of_few() -> None:
    assert spread([1.0])[::2] == (1.0, 1)
    assert math.isnan(spread([1.0]).std)
    assert math.isnan(spread([]).mean)


@pytest.mark.parametrize("one_to_one", [False, True])
def test_bootstrap_of_pairs_against_every_resample(one_to_one: bool) -> None:
    x = [0.3, -1.0, 2.5, 0.9, 4.0]
    cells = {(k if one_to_one else 0, k): value for k, value in enumerate(x)}
    means = [np.mean(drawn) for drawn in itertools.product(x, repeat=5)]
    expected = np.quantile(means, expanded(5, 0.8))
    got = bootstrap_interval(cells, MANY._replace(confidence=0.8))
    np.testing.assert_allclose(got, expected, atol=0.03)


def test_bootstrap_of_many_pairs_against_scipy() -> None:
    x = np.random.default_rng(1).exponential(size=200)
    got = bootstrap_interval({(0, k): value for k, value in enumerate(x)}, Inference(resamples=20_000))
    theirs = stats.bootstrap((x,), np.mean, n_resamples=20_000, method="percentile", rng=2)
    np.testing.assert_allclose(got, theirs.confidence_interval, atol=0.012)


def test_bootstrap_draws_orders_and_seeds_not_runs() -> None:
    """Against every choice of orders and seeds of a 2 x 3 grid with a gap."""
    values = np.array([[1.0, 4.0, 2.0], [8.0, math.nan, 5.0]])
    means = []
    for orders in itertools.product(range(2), repeat=2):
        for seeds in itertools.product(range(3), repeat=3):
            drawn = values[np.ix_(orders, seeds)]
            if not np.isnan(drawn).all():
                means.append(np.nanmean(drawn))
    expected = np.quantile(means, expanded(2, 0.6))
    np.testing.assert_allclose(bootstrap_interval(cells_of(values), MANY._replace(confidence=0.6)), expected,
                               atol=0.03)  # fmt: skip


def test_bootstrap_knows_that_runs_of_one_order_go_together() -> None:
    values = np.repeat(np.array([[0.0], [1.0], [0.2], [0.9]]), 10, axis=1)
    low, high = bootstrap_interval(cells_of(values), Inference())
    as_if_independent = bootstrap_interval({(0, k): v for k, v in enumerate(values.ravel())}, Inference())
    assert high - low > 2 * (as_if_independent.high - as_if_independent.low)


def test_bootstrap_is_the_same_each_time_and_its_seed_counts() -> None:
    cells = {(0, k): k**0.5 for k in range(9)}
    assert bootstrap_interval(cells, Inference()) == bootstrap_interval(cells, Inference())
    assert bootstrap_interval(cells, Inference()) != bootstrap_interval(cells, Inference(seed=1))


def test_expanded_percentiles_are_as_wide_as_students_for_normal_values() -> None:
    for num in (3, 8, 30):
        low, _ = expanded(num, 0.95)
        width = -stats.norm.ppf(low) * math.sqrt((num - 1) / num)  # in units of the standard error
        assert width == pytest.approx(stats.t.ppf(0.975, num - 1))


@given(st.lists(st.integers(-4, 4), min_size=1, max_size=7))
def test_sign_flip_against_every_choice_of_signs(x: list[int]) -> None:
    choices = itertools.product((1, -1), repeat=len(x))
    sums = [abs(sum(sign * value for sign, value in zip(signs, x, strict=True))) for signs in choices]
    assert sign_flip_test([0.1 * v for v in x]) == np.mean([one >= abs(sum(x)) for one in sums])


def test_sign_flip_against_scipy() -> None:
    x = np.random.default_rng(0).normal(0.4, 1, 9)
    theirs = stats.permutation_test((x, np.zeros(9)), lambda a, b: np.mean(a - b), permutation_type="samples",
                                    n_resamples=np.inf)  # fmt: skip
    assert sign_flip_test(x.tolist()) == pytest.approx(theirs.pvalue)
    many = np.random.default_rng(3).normal(0.3, 1, 40)
    assert sign_flip_test(many.tolist()) == pytest.approx(stats.ttest_1samp(many, 0).pvalue, abs=0.01)
    assert sign_flip_test([1.0] * 40, resamples=999) == 1 / 1000  # never 0


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0.001, 0.999))
def test_holm_rejects_what_its_steps_reject(p: list[float], alpha: float) -> None:
    rejected: set[int] = set()
    for step, k in enumerate(sorted(range(len(p)), key=lambda k: p[k])):
        if p[k] * (len(p) - step) > alpha:
            break
        rejected.add(k)
    adjusted = holm(p)
    assert {k for k, value in enumerate(adjusted) if value <= alpha} == rejected
    assert all(a >= b for a, b in zip(adjusted, p, strict=True))


def test_holm_leaves_out_what_is_no_test() -> None:
    got = holm([0.02, math.nan, 0.04])
    assert got[::2] == [0.04, 0.04]
    assert math.isnan(got[1])


def test_components_are_those_of_the_analysis_of_variance() -> None:
    random = np.random.default_rng(4)
    y_OS = 3 * random.normal(size=(4, 1)) + 2 * random.normal(size=(1, 5)) + random.normal(size=(4, 5))
    O, S = y_OS.shape  # noqa: E741
    rows, columns, mean = y_OS.mean(1), y_OS.mean(0), y_OS.mean()
    ms_order = S * ((rows - mean) ** 2).sum() / (O - 1)
    ms_seed = O * ((columns - mean) ** 2).sum() / (S - 1)
    ms_rest = ((y_OS - rows[:, None] - columns + mean) ** 2).sum() / ((O - 1) * (S - 1))
    got = components(cells_of(y_OS))
    np.testing.assert_allclose(got[:3], [(ms_order - ms_rest) / S, (ms_seed - ms_rest) / O, ms_rest])


@pytest.mark.parametrize("gaps", [[], [(0, 1)], [(0, 1), (2, 3), (1, 0), (1, 1)]])
def test_components_are_unbiased_with_gaps(gaps: list[tuple[int, int]]) -> None:
    """An estimate is y'Qy: Q is read off, and E[y'Qy] = trace(Q V) must be the component that V is of."""
    places = [place for place in np.ndindex(3, 4) if place not in gaps]
    N = len(places)

    def estimate(y_N: np.ndarray) -> np.ndarray:
        # shifted by a component that is known, so that nothing is clipped
        known = {place: 1e3 * (place[0] + place[1]) + 1e3 * ((place[0] * place[1]) % 3) for place in places}
        whole = np.array(components({p: known[p] + v for p, v in zip(places, y_N, strict=True)})[:3])
        mirrored = np.array(components({p: known[p] - v for p, v in zip(places, y_N, strict=True)})[:3])
        base = np.array(components(known)[:3])
        return (whole + mirrored) / 2 - base  # the quadratic part alone

    unit = np.eye(N) * 10
    Q = np.zeros((3, N, N))
    for a, b in itertools.product(range(N), repeat=2):
        Q[:, a, b] = (estimate(unit[a] + unit[b]) - estimate(unit[a]) - estimate(unit[b])) / 200
    orders, seeds = np.array(places).T
    for k, V in enumerate([orders[:, None] == orders, seeds[:, None] == seeds, np.eye(N)]):
        expected = np.trace(Q @ V, axis1=1, axis2=2)
        np.testing.assert_allclose(expected, np.eye(3)[k], atol=1e-5)


def test_components_of_one_order_and_of_none() -> None:
    one = components({(0, 1): 1.0, (0, 2): 3.0})
    assert (one.seed, math.isnan(one.order), math.isnan(one.rest)) == (2.0, True, True)
    assert components({(1, 0): 1.0, (2, 0): 3.0}).order == 2.0
    crossed = components({(0, 0): 1.0, (1, 1): 3.0, (2, 2): 5.0})
    assert all(map(math.isnan, crossed[:3]))  # every order has a seed of its own: nobody can tell
    assert math.isnan(components({}).seed)


def test_negative_components_are_named() -> None:
    got = components(cells_of(np.array([[0.0, 1.0], [1.0, 0.0]])))
    assert got == Components(0.0, 0.0, 1.0, ("order", "seed"))


def test_worst_order() -> None:
    values = {("a", 1): 1.0, ("a", 2): 3.0, ("b", 1): 2.5}
    assert worst_order(values, lower=False) == ("a", 2.0)
    assert worst_order(values, lower=True) == ("b", 2.5)
    assert worst_order({("a", 1): 1.0}, lower=True) is None


@pytest.mark.parametrize(
    ("how", "key"),
    [
        (Inference(interval="wald"), "--interval"),
        (Inference(resamples=10), "--resamples"),
        (Inference(confidence=1.0), "--confidence"),
        (Inference(confidence=math.nan), "--confidence"),
    ],
)
def test_inference_out_of_range(how: Inference, key: str) -> None:
    with pytest.raises(InputError, match=key):
        how.check()
