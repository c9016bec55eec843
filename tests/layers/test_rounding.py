"""Shares of a sequence against exact fractions, and the Switch's keys against their distribution."""

import math
from decimal import Decimal
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from scipy import stats

from cl_moe.layers import Capacity, ExpertChoice, MixtureOfDepths, MoE, Switch, fold_load
from cl_moe.layers.rounding import whole_share, whole_shares


@example(10, Decimal("1.1"), 1, "ceil")
@example(100, Decimal("0.29"), 1, "floor")
@given(
    st.integers(0, 4096),
    st.decimals("0.01", "4", places=2),
    st.integers(1, 64),
    st.sampled_from(["ceil", "floor"]),
)
def test_a_share_is_that_of_exact_fractions(num_tokens, factor, parts, rounding):
    share = Fraction(factor) * num_tokens / parts
    expected = math.ceil(share) if rounding == "ceil" else math.floor(share)
    assert whole_share(num_tokens, float(factor), parts, rounding) == expected
    shares = whole_shares(torch.tensor([[num_tokens]]), float(factor), parts, rounding)
    assert shares.tolist() == [[expected]]


@given(st.integers(0, 10**6), st.floats(1e-3, 100), st.integers(1, 500), st.sampled_from(["ceil", "floor"]))
def test_both_forms_are_one(num_tokens, factor, parts, rounding):
    one = whole_share(num_tokens, factor, parts, rounding)
    assert whole_shares(torch.tensor([num_tokens]), factor, parts, rounding).tolist() == [one]


@pytest.mark.parametrize("masked", [False, True])
def test_what_is_whole_but_for_the_last_bits_stays_whole(masked: bool):
    assert (10 * 1.1, 20 * 1.1 / 2, 25 * 0.28) > (11, 11, 7)
    assert 100 * 0.29 < 29
    slots = [Capacity(1.1, 1.1, 0).slots(torch.tensor([10]), 1, training=True)]
    slots.append(Capacity(0.29, 0.29, 0, "floor").slots(torch.tensor([100]), 1, training=True))
    assert [int(one) for one in slots] == [11, 29]
    x = torch.randn(1, 25, 8)
    mask = torch.ones(1, 25, dtype=torch.bool) if masked else None
    assert MixtureOfDepths(torch.nn.Identity(), 8, 0.28)(x, mask)[1].kept.sum() == 7
    part = None if mask is None else mask[:, :20]
    routing = MoE(8, 2, 8, ExpertChoice(capacity_factor=1.1))(x[:, :20], part)[1]
    assert fold_load(routing).count.tolist() == [11, 11]


@pytest.mark.parametrize(("dim", "scale"), [(64, 0.1), (16, 2.0)])
def test_switch_keys_are_a_truncated_normal_of_variance_scale_over_width(dim: int, scale: float):
    torch.manual_seed(0)
    key = torch.empty(400, dim)
    Switch(init_scale=scale).init_keys(key)
    expected = stats.truncnorm(-2, 2, scale=math.sqrt(scale / dim))
    assert stats.kstest(key.double().flatten().numpy(), expected.cdf).pvalue > 1e-4
    wrong = stats.truncnorm(-2, 2, scale=scale / dim)
    assert stats.kstest(key.double().flatten().numpy(), wrong.cdf).pvalue < 1e-9
