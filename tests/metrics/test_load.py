"""Load metrics against scipy, formulas written again in numpy, and laws."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import entropy, variation

import cl_moe.metrics.functional as F  # noqa: N812
from cl_moe.errors import InputError

FORMULAS = (
    F.usage,
    F.unevenness,
    F.normalized_entropy,
    F.effective_experts,
    F.gini,
    F.max_violation,
    F.dead_fraction,
    F.squared_cv,
)
loads = arrays(np.float64, st.integers(2, 40), elements=st.one_of(st.just(0.0), st.floats(1e-6, 1e6))).filter(
    lambda load: load.sum() > 0
)


@given(loads)
def test_against_scipy_and_numpy(load):
    N, p = len(load), load / load.sum()
    z = torch.from_numpy(load)
    near = {"rel": 1e-9, "abs": 1e-9}
    assert F.usage(z).item() == np.count_nonzero(load) / N
    assert F.unevenness(z).item() == pytest.approx(entropy(p, np.full(N, 1 / N)), **near)
    assert F.normalized_entropy(z).item() == pytest.approx(entropy(p) / math.log(N), **near)
    assert F.effective_experts(z).item() == pytest.approx(math.exp(entropy(p)), **near)
    assert F.squared_cv(z).item() == pytest.approx(variation(load) ** 2, **near)
    pairs = np.abs(p[:, None] - p[None, :]).sum()
    assert F.gini(z).item() == pytest.approx(pairs / (2 * N * N * p.mean()), **near)
    assert F.max_violation(z).item() == pytest.approx(load.max() / load.mean() - 1, **near)
    assume(not np.isclose(p * 10 * N, 1).any())
    assert F.dead_fraction(z).item() == np.count_nonzero(p < 1 / (10 * N)) / N


@given(loads)
def test_bounds(load):
    N, z, slack = len(load), torch.from_numpy(load), 1e-9
    assert 0 < F.usage(z) <= 1
    assert -slack <= F.unevenness(z) <= math.log(N) + slack
    assert -slack <= F.normalized_entropy(z) <= 1 + slack
    assert 1 - slack <= F.effective_experts(z) <= N + slack * N
    assert -slack <= F.gini(z) <= 1 - 1 / N + slack
    assert -slack <= F.max_violation(z) <= N - 1 + slack * N
    assert 0 <= F.dead_fraction(z) < 1
    assert -slack <= F.squared_cv(z) <= N - 1 + slack * N


@given(loads, st.randoms(use_true_random=False), st.floats(1e-3, 1e3))
def test_neither_order_nor_scale_of_the_load_matters(load, random, factor):
    order = list(range(len(load)))
    random.shuffle(order)
    p = load / load.sum()
    for formula in FORMULAS:
        if formula is F.dead_fraction and np.isclose(p * 10 * len(load), 1).any():
            continue
        moved = formula(torch.from_numpy(load[order] * factor)).item()
        assert moved == pytest.approx(formula(torch.from_numpy(load)).item(), rel=1e-9, abs=1e-9), formula


@pytest.mark.parametrize("N", [2, 3, 7, 100])
def test_uniform_is_exactly_even(N):
    z = torch.full((N,), 0.3)
    assert [formula(z).item() for formula in FORMULAS] == [1, 0, 1, N, 0, 0, 0, 0]


@pytest.mark.parametrize("N", [2, 3, 7, 100])
def test_one_expert_takes_everything(N):
    z = torch.zeros(N)
    z[N // 2] = 5
    expected = [1 / N, math.log(N), 0, 1, 1 - 1 / N, N - 1, 1 - 1 / N, N - 1]
    for formula, value in zip(FORMULAS, expected, strict=True):
        assert formula(z).item() == pytest.approx(value, abs=1e-12), formula.__name__


def test_a_single_expert_is_even_but_its_entropy_has_no_scale():
    z = torch.tensor([3.0])
    expected = [1, 0, math.nan, 1, 0, 0, 0, 0]
    np.testing.assert_array_equal([formula(z).item() for formula in FORMULAS], expected)


def test_no_load():
    z = torch.zeros(4)
    assert F.usage(z) == 0
    assert all(formula(z).isnan() for formula in FORMULAS if formula is not F.usage)


def test_no_experts():
    assert all(formula(torch.zeros(0)).isnan() for formula in FORMULAS)


def test_the_edge_of_dead_is_alive():
    """p = 1/(10 N) exactly is not below it."""
    assert F.dead_fraction(torch.tensor([1, 19])).item() == 0  # p = 1/20 = 1/(10 * 2)
    assert F.dead_fraction(torch.tensor([1, 20])).item() == 0.5


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bfloat16, torch.float64])
def test_every_dtype_gives_a_float64_scalar(dtype):
    for formula in FORMULAS:
        found = formula(torch.tensor([1, 2, 0], dtype=dtype))
        assert found.shape == ()
        assert found.dtype == torch.float64


def test_a_large_load_does_not_overflow():
    z = torch.tensor([1e308, 1e308, 0.0], dtype=torch.float64)
    assert F.unevenness(z).item() == pytest.approx(math.log(1.5), abs=1e-12)


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("bad", [[[1.0, 2.0]], [-1.0, 2.0], [math.nan, 1.0], [math.inf, 1.0]])
def test_bad_loads_are_refused(formula, bad):
    with pytest.raises(InputError, match="change: load"):
        formula(torch.tensor(bad))


def test_drop_rate():
    assert F.drop_rate(torch.tensor(6), torch.tensor(8)).item() == 0.25
    assert F.drop_rate(torch.tensor(0), torch.tensor(0)).isnan()
    for kept, slots in [(9, 8), (-1, 8)]:
        with pytest.raises(InputError, match="kept"):
            F.drop_rate(torch.tensor(kept), torch.tensor(slots))
