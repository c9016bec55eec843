"""Calibration against torchmetrics and plain Python: any split over batches and ranks gives the same."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.classification import binary_calibration_error, multiclass_calibration_error

from cl_moe.errors import InputError
from cl_moe.metrics import CalibrationErrors, Tally
from cl_moe.metrics.answers import confidences, right_answers
from cl_moe.metrics.functional import calibration_bins, calibration_error
from cl_moe.seeds import generator

ANSWERS = st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=40)


def answers(size, seed=0):
    draw = generator(seed, "answers")
    return torch.rand(size, generator=draw, dtype=torch.float64), torch.rand(size, generator=draw) < 0.6


def by_hand(confidence, right, num_bins):
    """Guo et al. 2017, equations 2 and 3, example by example; bins are closed on their right."""
    total = 0.0
    edges = torch.linspace(0, 1, num_bins + 1, dtype=torch.float64).tolist()
    pairs = list(zip(confidence, right, strict=True))
    for low, high in pairwise(edges):
        inside = [(c, r) for c, r in pairs if low < c <= high or (low == 0 == c)]
        if inside:
            accuracy = sum(r for _, r in inside) / len(inside)
            total += len(inside) / len(pairs) * abs(accuracy - sum(c for c, _ in inside) / len(inside))
    return total


@given(ANSWERS, st.integers(1, 20))
def test_it_equals_the_formula_and_stays_in_its_bounds(pairs, num_bins):
    confidence, right = zip(*pairs, strict=True)
    found = calibration_error(torch.tensor(confidence, dtype=torch.float64), torch.tensor(right), num_bins)
    assert found.item() == pytest.approx(by_hand(confidence, right, num_bins), abs=1e-12)
    assert 0 <= found.item() <= 1 + 1e-12


@pytest.mark.parametrize("size", [1, 10, 1000])
def test_it_equals_torchmetrics(size):
    """Which closes bins on their left; no random number stands on an edge."""
    confidence, right = answers(size)
    expected = binary_calibration_error(confidence, right.long(), n_bins=15, norm="l1")
    assert calibration_error(confidence, right).item() == pytest.approx(expected.item(), abs=1e-6)
    logits = 3 * torch.randn(size, 7, generator=generator(1, "logits"), dtype=torch.float64)
    target = torch.randint(7, (size,), generator=generator(2, "targets"))
    expected = multiclass_calibration_error(logits.softmax(1), target, 7, n_bins=15, norm="l1")
    found = calibration_error(confidences(logits), right_answers(logits, target))
    assert found.item() == pytest.approx(expected.item(), abs=1e-6)


def test_edges_belong_to_the_bin_below():
    sums = calibration_bins(torch.tensor([0.0, 0.25, 0.26, 0.5, 1.0]), torch.ones(5).bool(), 4)
    assert sums[:, 0].tolist() == [2, 2, 0, 1]


@settings(max_examples=25)
@given(st.integers(1, 7), st.permutations(range(23)))
def test_batches_of_any_size_and_order_give_the_same(size, order):
    confidence, right = answers(23)
    whole, parts, split = (
        CalibrationErrors(2),
        CalibrationErrors(2),
        [CalibrationErrors(2), CalibrationErrors(2)],
    )
    whole.update(1, confidence, right)
    for place, rows in enumerate(torch.tensor(order).split(size)):
        parts.update(1, confidence[rows], right[rows])
        split[place % 2].update(1, confidence[rows], right[rows])
    if all(part.update_called for part in split):
        split[0].merge_state(split[1])  # as ranks add up
        torch.testing.assert_close(split[0].compute(), whole.compute(), equal_nan=True, atol=1e-14, rtol=0)
    torch.testing.assert_close(parts.compute(), whole.compute(), equal_nan=True, atol=1e-14, rtol=0)
    assert whole.compute()[0].isnan()
    assert whole.compute()[1].item() == pytest.approx(calibration_error(confidence, right).item(), abs=1e-14)


def test_one_experience_still_gives_a_row_and_none_of_them_no_warning():
    metric = CalibrationErrors(1)
    metric.update(0, *answers(3))
    assert metric.compute().shape == (1,)
    assert Tally(2).calibration_errors().isnan().all()


def test_confidence_is_the_probability_of_the_answer_and_an_unknown_class_is_never_right():
    logits = torch.tensor([[2.0, 1.0, float("-inf")], [0.0, 0.0, 0.0], [90.0, 0.0, 0.0]])
    expected = [1 / (1 + torch.tensor(-1.0).exp().item()), 1 / 3, 1.0]
    assert confidences(logits).tolist() == pytest.approx(expected)
    assert right_answers(logits, torch.tensor([0, -1, -1])).tolist() == [True, False, False]
    assert right_answers(torch.empty(2, 0), torch.tensor([-1, -1])).tolist() == [False, False]


def test_other_shapes_are_refused():
    with pytest.raises(InputError, match="confidence"):
        calibration_bins(torch.ones(2), torch.ones(3).bool())
    with pytest.raises(InputError, match="num_bins"):
        calibration_error(torch.ones(2), torch.ones(2).bool(), 0)
