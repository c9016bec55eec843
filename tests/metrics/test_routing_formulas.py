"""Drift, saturation, leak and task information against plain Python, numpy, scikit-learn, and their laws."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import mutual_info_score
from sklearn.metrics.cluster import expected_mutual_information

from cl_moe.errors import InputError
from cl_moe.metrics.functional import (
    Choices,
    cohort_shares,
    expected_information,
    leak,
    router_saturation,
    routing_drift,
    task_information,
)

SETS = st.lists(st.frozensets(st.integers(0, 6), max_size=4), min_size=1, max_size=12)
COUNTS = arrays(np.int64, st.tuples(st.integers(1, 4), st.integers(1, 6)), elements=st.integers(0, 9))


def choices_of(sets) -> Choices:
    ids = [expert for one in sets for expert in sorted(one)]
    return Choices(torch.tensor(ids).int(), torch.tensor([len(one) for one in sets]).int(), len(sets))


@given(st.data(), SETS)
def test_drift_and_saturation_are_those_of_sets(data, then):
    now = data.draw(st.lists(st.frozensets(st.integers(0, 9)), min_size=len(then), max_size=len(then)))
    pairs = list(zip(now, then, strict=True))
    drift = routing_drift(choices_of(now), choices_of(then)).item()
    assert drift == pytest.approx(sum(a != b for a, b in pairs) / len(pairs), abs=1e-15)
    kept = [len(a & b) / len(b) for a, b in pairs if b]
    saturation = router_saturation(choices_of(now), choices_of(then)).item()
    if kept:
        assert saturation == pytest.approx(np.mean(kept), abs=1e-15)
        assert 0 <= saturation <= 1
    else:
        assert math.isnan(saturation)


@given(SETS)
def test_nothing_changed(sets):
    same = choices_of(sets)
    assert routing_drift(same, same).item() == 0
    assert router_saturation(same, same).item() in (1.0, pytest.approx(math.nan, nan_ok=True))


def test_padding_is_in_no_denominator():
    """Four places, of which one is padding: nobody chose for it, then and now."""
    then = Choices(torch.tensor([0, 1, 2]).int(), torch.tensor([1, 1, 1, 0]).int(), 3)
    now = Choices(torch.tensor([0, 1, 3]).int(), torch.tensor([1, 1, 1, 0]).int(), 3)
    assert routing_drift(now, then).item() == pytest.approx(1 / 3)
    assert math.isnan(routing_drift(choices_of([]), choices_of([])).item())


def test_choices_of_different_tokens_are_refused():
    with pytest.raises(InputError, match="same probe set"):
        routing_drift(choices_of([{1}]), choices_of([{1}, {2}]))


@settings(max_examples=50)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(1, 4), st.data())
def test_shares_and_leak_are_sums_over_experts(sizes, T, data):
    z = data.draw(arrays(np.float64, (T, sum(sizes)), elements=st.floats(0, 5, width=16)))
    births = sorted(data.draw(st.lists(st.integers(1, T), min_size=len(sizes) - 1, max_size=len(sizes) - 1)))
    births = [0, *births]
    share_CT = cohort_shares(torch.from_numpy(z), sizes)
    cohort_N = np.repeat(np.arange(len(sizes)), sizes)
    leaks = []
    for j in range(T):
        if z[j].sum() == 0:
            assert share_CT[:, j].isnan().all()
            continue
        for c in range(len(sizes)):
            assert share_CT[c, j].item() == pytest.approx(z[j][cohort_N == c].sum() / z[j].sum(), abs=1e-12)
        if j < T - 1:
            leaks.append(sum(z[j][n] for n, c in enumerate(cohort_N) if births[c] > j) / z[j].sum())
    found = leak(share_CT, births).item()
    assert found == pytest.approx(np.mean(leaks), abs=1e-12) if leaks else math.isnan(found)


def test_without_newborns_nothing_leaks_and_one_experience_has_no_past():
    assert leak(torch.ones(1, 3), [0]).item() == 0
    assert math.isnan(leak(torch.ones(1, 1), [0]).item())
    with pytest.raises(InputError, match="sizes"):
        cohort_shares(torch.ones(2, 5), [2, 2])


def labels(counts):
    """The two labellings of slots that have these counts."""
    T, N = np.indices(counts.shape)
    return np.repeat(T.ravel(), counts.ravel()), np.repeat(N.ravel(), counts.ravel())


@given(COUNTS)
def test_task_information_is_scikit_learns_mutual_information_corrected_for_chance(counts):
    found = task_information(torch.from_numpy(counts)).item()
    if (counts.sum(axis=1) > 0).sum() < 2:
        assert math.isnan(found)
        return
    experience, expert = labels(counts)
    chance = expected_mutual_information(counts[counts.sum(1) > 0][:, counts.sum(0) > 0], int(counts.sum()))
    share = counts.sum(axis=1) / counts.sum()
    entropy = -sum(p * np.log(p) for p in share if p)
    oracle = (mutual_info_score(experience, expert) - chance) / entropy
    assert found == pytest.approx(oracle, abs=1e-9)
    assert -1 <= found <= 1 + 1e-12


def test_chance_is_the_mean_over_shuffles():
    draw = np.random.default_rng(0)
    counts = draw.integers(0, 12, (3, 5))
    experience, expert = labels(counts)
    shuffled = [mutual_info_score(draw.permutation(experience), expert) for _ in range(2000)]
    margins = torch.from_numpy(counts.sum(axis=1)).double(), torch.from_numpy(counts.sum(axis=0)).double()
    error = np.std(shuffled) / math.sqrt(len(shuffled))
    assert expected_information(*margins).item() == pytest.approx(np.mean(shuffled), abs=5 * error)


@pytest.mark.parametrize("scale", [1, 1000, 100_000])
def test_what_is_left_out_of_long_sums_is_nothing(scale):
    """Large counts, for which only the middle of a distribution is summed."""
    counts = np.array([[3, 1, 0], [1, 2, 1], [0, 0, 5]]) * scale
    counts = counts[:, :2] if scale == 100_000 else counts
    margins = torch.from_numpy(counts.sum(axis=1)).double(), torch.from_numpy(counts.sum(axis=0)).double()
    oracle = expected_mutual_information(counts[counts.sum(1) > 0], int(counts.sum()))
    assert expected_information(*margins).item() == pytest.approx(oracle, rel=1e-6)


def test_an_expert_of_ones_own_tells_everything_and_a_shared_one_nothing():
    own, shared = torch.eye(4).long() * 1000, torch.full((4, 8), 1000)
    assert task_information(own).item() == pytest.approx(1, abs=1e-2)
    assert task_information(shared).item() == pytest.approx(0, abs=1e-3)
    assert math.isnan(task_information(own[:1]).item())
    with pytest.raises(InputError, match="whole numbers"):
        task_information(torch.ones(2, 2))


@given(COUNTS, st.randoms())
def test_the_order_of_experiences_and_of_experts_does_not_matter(counts, random):
    rows, columns = list(range(counts.shape[0])), list(range(counts.shape[1]))
    random.shuffle(rows), random.shuffle(columns)
    one, other = (task_information(torch.from_numpy(c)) for c in (counts, counts[rows][:, columns]))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-12, equal_nan=True)
