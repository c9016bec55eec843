"""Stream metrics against the worked example, formulas written again in numpy, and laws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import cl_moe.metrics.functional as F  # noqa: N812
from cl_moe.errors import InputError

EXAMPLE = torch.tensor(
    [
        [0.10, 0.20, 0.15, 0.10],
        [0.70, 0.90, 0.20, 0.10],
        [0.90, 0.60, 0.30, 0.20],
        [0.85, 0.65, 0.80, 0.30],
        [0.80, 0.50, 0.75, 0.90],
    ],
    dtype=torch.float64,
)
SIMPLE = (
    F.average_accuracy,
    F.forgetting,
    F.backward_transfer,
    F.forward_transfer,
    F.average_anytime_accuracy,
    F.learning_accuracy,
    F.min_accuracy,
    F.worst_case_accuracy,
)


@st.composite
def matrices(draw, smallest=2):
    T = draw(st.integers(smallest, 6))
    return draw(arrays(np.float64, (T + 1, T), elements=st.floats(-5, 1)))


def oracle(R):
    """The formulas as FORMULAS 1 writes them: j and i count from 1, b = R[0]."""
    T = R.shape[1]

    def r(i, j):
        return R[i, j - 1]

    old = range(1, T)
    forgotten = [max(r(l, j) for l in range(j, T)) - r(T, j) for j in old]  # noqa: E741
    worst = sum(min(r(n, j) for n in range(j + 1, T + 1)) for j in old) / (T - 1)
    return {
        F.average_accuracy: sum(r(T, j) for j in range(1, T + 1)) / T,
        F.forgetting: sum(forgotten) / (T - 1),
        F.backward_transfer: sum(r(T, j) - r(j, j) for j in old) / (T - 1),
        F.forward_transfer: sum(r(j - 1, j) - r(0, j) for j in range(2, T + 1)) / (T - 1),
        F.average_anytime_accuracy: np.mean(
            [np.mean([r(i, j) for j in range(1, i + 1)]) for i in range(1, T + 1)]
        ),
        F.learning_accuracy: np.mean([r(j, j) for j in range(1, T + 1)]),
        F.min_accuracy: worst,
        F.worst_case_accuracy: r(T, T) / T + (1 - 1 / T) * worst,
    }


def test_worked_example():
    expected = {
        F.average_accuracy: 0.7375,
        F.forgetting: 0.1,
        F.backward_transfer: -0.05 / 3,
        F.forward_transfer: 0.35,
        F.learning_accuracy: (0.7 + 0.6 + 0.8 + 0.9) / 4,
        F.average_anytime_accuracy: (0.7 + 0.75 + 2.3 / 3 + 0.7375) / 4,
        F.min_accuracy: (0.8 + 0.5 + 0.75) / 3,
    }
    for formula, value in expected.items():
        assert formula(EXAMPLE).item() == pytest.approx(value, abs=1e-15), formula.__name__
    per_experience = F.forgetting_per_experience(EXAMPLE)
    torch.testing.assert_close(
        per_experience, torch.tensor([0.1, 0.15, 0.05, torch.nan], dtype=torch.float64), equal_nan=True
    )


@given(matrices())
def test_against_the_formulas_in_numpy(R):
    for formula, value in oracle(R).items():
        found = formula(torch.from_numpy(R))
        assert found.shape == ()
        assert found.dtype == torch.float64
        assert found.item() == pytest.approx(value, abs=1e-12), formula.__name__


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_every_dtype_gives_float64(dtype):
    R = torch.tensor([[0, 0], [1, 0], [0, 1]], dtype=dtype)
    assert all(formula(R).dtype == torch.float64 for formula in SIMPLE)
    assert F.forgetting(R).item() == 1


def test_one_experience_defines_scores_but_no_transfer():
    R = torch.tensor([[0.1], [0.8]], dtype=torch.float64)
    for formula in (F.average_accuracy, F.average_anytime_accuracy, F.learning_accuracy):
        assert formula(R).item() == 0.8
    for formula in (
        F.forgetting,
        F.backward_transfer,
        F.forward_transfer,
        F.min_accuracy,
        F.worst_case_accuracy,
    ):
        assert formula(R).isnan()
    assert F.forgetting_per_experience(R).isnan().tolist() == [True]


def test_before_training_nothing_is_defined():
    view = F.up_to(EXAMPLE, 0)
    assert view.shape == (1, 0)
    assert all(formula(view).isnan() for formula in SIMPLE)
    assert F.forgetting_per_experience(view).shape == (0,)


def test_two_experiences():
    R = torch.tensor([[0.5, 0.25], [1.0, 0.5], [0.25, 0.75]], dtype=torch.float64)
    found = [formula(R).item() for formula in SIMPLE]
    assert found == [0.5, 0.75, -0.75, 0.25, 0.75, 0.875, 0.25, 0.5]


def test_forgetting_is_negative_where_the_last_score_is_the_best():
    R = torch.tensor([[0.0, 0.0], [0.5, 0.0], [0.75, 0.5]])
    assert F.forgetting(R).item() == -0.25


def test_forgetting_does_not_look_before_the_experience_was_learnt():
    R = torch.tensor([[1.0, 1.0, 0.0], [0.5, 1.0, 0.0], [0.5, 0.25, 0.0], [0.5, 0.25, 0.5]])
    assert F.forgetting_per_experience(R).tolist()[:2] == [0.0, 0.0]


@pytest.mark.parametrize("i", range(5))
def test_a_view_equals_a_shorter_stream(i):
    view = F.up_to(EXAMPLE, i)
    assert torch.equal(view, EXAMPLE[: i + 1, :i])
    assert torch.equal(F.up_to(EXAMPLE[: i + 1], i), view)  # the rest need not be measured yet


@pytest.mark.parametrize(("R", "i"), [(EXAMPLE, -1), (EXAMPLE, 5), (EXAMPLE[:3], 3), (EXAMPLE[0], 0)])
def test_no_such_point(R, i):
    with pytest.raises(InputError, match="i = "):
        F.up_to(R, i)


@pytest.mark.parametrize("shape", [(3,), (3, 3), (2, 3), (4, 2), (2, 2, 1)])
@pytest.mark.parametrize("formula", [*SIMPLE, F.forgetting_per_experience])
def test_wrong_shapes_are_refused(formula, shape):
    with pytest.raises(InputError, match="T \\+ 1, T"):
        formula(torch.zeros(shape))


@given(matrices(), st.floats(-2, 2))
def test_a_shift_of_all_scores_changes_no_difference(R, shift):
    for formula in (F.forgetting, F.backward_transfer, F.forward_transfer):
        moved, still = formula(torch.from_numpy(R + shift)), formula(torch.from_numpy(R))
        assert moved.item() == pytest.approx(still.item(), abs=1e-9)


@given(matrices())
def test_forgetting_bounds_backward_transfer(R):
    """The best score since learning is at least the score at learning."""
    R = torch.from_numpy(R)
    assert F.forgetting(R).item() >= -F.backward_transfer(R).item() - 1e-12


def test_intransigence():
    cumulative = EXAMPLE + 0.05
    assert F.intransigence(EXAMPLE, cumulative).item() == pytest.approx(0.05, abs=1e-15)
    assert F.intransigence(EXAMPLE, EXAMPLE).item() == 0
    lower = EXAMPLE.clone()
    lower[0], lower[4, 0] = 0.0, 0.0  # only the scores just after learning count
    assert F.intransigence(EXAMPLE, lower).item() == 0
    with pytest.raises(InputError, match="same shape"):
        F.intransigence(EXAMPLE, F.up_to(EXAMPLE, 3))


class TestAnytime:
    def test_a_dip_inside_an_experience_counts(self):
        inside = [torch.full((2, 4), 0.9) for _ in range(4)]
        inside[2][0, 1] = 0.05  # experience 1 dips while experience 2 is trained
        assert F.min_accuracy(EXAMPLE, inside).item() == pytest.approx((0.8 + 0.05 + 0.75) / 3, abs=1e-7)

    def test_evaluations_until_an_experience_is_learnt_do_not_count(self):
        inside = [torch.ones(1, 4) for _ in range(4)]
        for e in range(4):
            inside[e][:, e:] = 0.0
        assert torch.equal(F.min_accuracy(EXAMPLE, inside), F.min_accuracy(EXAMPLE))

    @settings(max_examples=30)
    @given(matrices(), st.data())
    def test_against_a_loop(self, R, data):
        T = R.shape[1]
        lengths = data.draw(st.lists(st.integers(0, 3), min_size=T, max_size=T))
        inside = [data.draw(arrays(np.float64, (n, T), elements=st.floats(-5, 1))) for n in lengths]
        worst = []
        for c in range(T - 1):
            scores = [R[i, c] for i in range(c + 2, T + 1)]
            scores += [row[c] for e in range(c + 1, T) for row in inside[e]]
            worst.append(min(scores))
        tensors = [torch.from_numpy(scores) for scores in inside]
        found = F.min_accuracy(torch.from_numpy(R), tensors).item()
        assert found == pytest.approx(np.mean(worst), abs=1e-12)
        worst_case = F.worst_case_accuracy(torch.from_numpy(R), tensors).item()
        assert worst_case == pytest.approx(R[T, T - 1] / T + (1 - 1 / T) * np.mean(worst), abs=1e-12)

    def test_nan_marks_what_was_not_evaluated(self):
        inside = torch.full((4, 3, 4), torch.nan)
        assert torch.equal(F.min_accuracy(EXAMPLE, inside), F.min_accuracy(EXAMPLE))

    @pytest.mark.parametrize(
        "inside", [[], [torch.zeros(1, 4)] * 3, [torch.zeros(4)] * 4, [torch.zeros(2, 3)] * 4]
    )
    def test_wrong_shapes(self, inside):
        with pytest.raises(InputError, match="anytime"):
            F.min_accuracy(EXAMPLE, inside)
