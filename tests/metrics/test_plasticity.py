"""Effective rank and dormant units against numpy, closed forms and the laws they must obey."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cl_moe.errors import InputError
from cl_moe.metrics.functional import dormant_fraction, effective_rank
from cl_moe.seeds import generator

SIZES = st.integers(1, 12)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed, "plasticity"), dtype=torch.float64)


def rank_by_numpy(x):
    values = np.linalg.svd(x.numpy(), compute_uv=False)
    p = values / values.sum()
    return math.exp(-sum(one * math.log(one) for one in p if one > 0))


@given(SIZES, SIZES, st.integers(0, 99))
def test_effective_rank_equals_numpy_and_stays_in_its_bounds(n, D, seed):
    x = random(n, D, seed=seed)
    rank = effective_rank(x).item()
    assert rank == pytest.approx(rank_by_numpy(x), rel=1e-9)
    assert 1 - 1e-9 <= rank <= min(n, D) + 1e-9


@pytest.mark.parametrize("n", [1, 2, 7])
def test_orthonormal_rows_have_rank_n_and_copies_of_one_row_rank_1(n):
    rows = torch.linalg.qr(random(9, n)).Q.T
    assert effective_rank(rows).item() == pytest.approx(n)
    assert effective_rank(random(1, 9).expand(n, 9)).item() == pytest.approx(1, abs=1e-5)


@given(st.sampled_from([1e-30, 1e-3, 7.0, 1e30]), st.integers(0, 9))
def test_effective_rank_ignores_scale_rotation_and_order(scale, seed):
    x = random(6, 4, seed=seed)
    turned = (
        scale * x[torch.randperm(6, generator=generator(seed, "order"))] @ torch.linalg.qr(random(4, 4)).Q
    )
    assert effective_rank(turned).item() == pytest.approx(effective_rank(x).item(), rel=1e-9)


@pytest.mark.parametrize(
    "x", [torch.empty(0, 3), torch.empty(3, 0), torch.zeros(2, 2), torch.full((2, 2), torch.inf)]
)
def test_effective_rank_of_nothing_is_undefined(x):
    assert effective_rank(x).isnan()


@given(
    st.lists(st.floats(0, 100, width=32), min_size=1, max_size=20), st.sampled_from([0.0, 0.025, 0.1, 1.0])
)
def test_dormant_fraction_equals_the_formula(activity, tau):
    mean = sum(activity) / len(activity)
    expected = sum(one <= tau * mean for one in activity) / len(activity)
    found = dormant_fraction(torch.tensor(activity, dtype=torch.float64), tau).item()
    borders = sum(abs(one - tau * mean) < 1e-9 * max(mean, 1) for one in activity)  # may round to either side
    assert abs(found - expected) <= borders / len(activity) * (tau > 0) + 1e-12
    if tau < 1 and mean > 0:
        assert found < 1


@given(st.lists(st.floats(0, 100), min_size=1, max_size=20))
def test_more_units_are_dormant_at_a_larger_tau(activity):
    found = [dormant_fraction(torch.tensor(activity), tau).item() for tau in (0.0, 0.025, 0.1, 1.0)]
    assert found == sorted(found)


def test_dead_layers_are_dormant_and_no_units_are_undefined():
    assert dormant_fraction(torch.zeros(5), 0.0) == 1
    assert dormant_fraction(torch.ones(5), 0.1) == 0
    assert dormant_fraction(torch.empty(0), 0.0).isnan()


def test_other_shapes_are_refused():
    with pytest.raises(InputError, match="x"):
        effective_rank(torch.zeros(3))
    with pytest.raises(InputError, match="activity"):
        dormant_fraction(torch.zeros(3, 2), 0.0)
    with pytest.raises(InputError, match="tau"):
        dormant_fraction(torch.zeros(3), -0.1)
