"""Metric keys of the contract, their values computed again by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import entropy

from cl_moe.errors import InputError
from cl_moe.layers.routing import ExpertLoad
from cl_moe.tracking.names import expert_points, numbered, objective, stream_points
from cl_moe.tracking.record import Record

R = np.array(
    [
        [0.10, 0.20, 0.15, 0.10],
        [0.70, 0.90, 0.20, 0.10],
        [0.90, 0.60, 0.30, 0.20],
        [0.85, 0.65, 0.80, 0.30],
        [0.80, 0.50, 0.75, 0.90],
    ]
)


def record_of(matrix=R, kind="classification", **parts):
    names = [f"part {j}" for j in range(matrix.shape[1])]
    return Record(kind, names, rows=[torch.from_numpy(row) for row in matrix], **parts)


def load_of(score, count, kept=None):
    count = torch.tensor(count)
    kept = count.sum() if kept is None else torch.tensor(kept)
    return ExpertLoad(torch.tensor(score, dtype=torch.float64), count, kept)


def test_the_worked_example_at_the_last_point():
    points = stream_points(record_of(), 4)
    assert points.pop("stream/average_accuracy") == pytest.approx(0.7375, abs=1e-15)
    assert points.pop("stream/forgetting") == pytest.approx(0.1, abs=1e-15)
    assert points.pop("stream/backward_transfer") == pytest.approx(-0.05 / 3, abs=1e-15)
    assert points.pop("stream/forward_transfer") == pytest.approx(0.35, abs=1e-15)
    assert points.pop("stream/learning_accuracy") == pytest.approx(0.75, abs=1e-15)
    assert points.pop("stream/average_anytime_accuracy") == pytest.approx(
        (0.7 + 0.75 + 2.3 / 3 + 0.7375) / 4, abs=1e-15
    )
    assert {key: points.pop(key) for key in list(points) if key.startswith("accuracy/")} == {
        f"accuracy/experience_0{j}": R[4, j] for j in range(4)
    }
    assert points == {
        "forgetting/experience_00": pytest.approx(0.1),
        "forgetting/experience_01": pytest.approx(0.15),
        "forgetting/experience_02": pytest.approx(0.05),
    }


@pytest.mark.parametrize("i", range(5))
def test_a_point_sees_no_further_than_itself(i):
    """Rows <= i and experiences <= i: the same point of a run that ended there."""
    points = stream_points(record_of(), i)
    changed = R.copy()
    changed[i + 1 :] = 0.123
    assert stream_points(record_of(changed), i) == points
    assert stream_points(record_of(R[: i + 1]), i) == points
    assert [points[f"accuracy/experience_0{j}"] for j in range(4)] == R[i].tolist()


def test_undefined_values_have_no_key():
    before = stream_points(record_of(), 0)
    assert before.keys() == {f"accuracy/experience_0{j}" for j in range(4)}
    first = stream_points(record_of(), 1)
    assert "stream/forgetting" not in first
    assert "forgetting/experience_00" not in first
    assert first["stream/average_accuracy"] == 0.7
    assert all(math.isfinite(value) for i in range(5) for value in stream_points(record_of(), i).values())


def test_language_gives_losses_and_no_accuracy():
    losses = np.array([[4.0, 5.0], [2.0, 4.5], [2.5, 1.0]])
    points = stream_points(record_of(-losses, "language"), 2)
    assert points == {
        "loss/experience_00": 2.5,
        "loss/experience_01": 1.0,
        "perplexity/experience_00": pytest.approx(math.exp(2.5)),
        "perplexity/experience_01": pytest.approx(math.e),
        "forgetting/experience_00": 0.5,  # positive: the loss rose
        "stream/average_loss": 1.75,
        "stream/forgetting": 0.5,
        "stream/backward_transfer": -0.5,
        "stream/forward_transfer": 0.5,  # 5.0 before, 4.5 just before its training
        "stream/average_anytime_loss": pytest.approx((2.0 + 1.75) / 2),
        "stream/learning_loss": 1.5,
    }


def test_a_perplexity_beyond_floats_is_left_out():
    points = stream_points(record_of(-np.array([[1000.0], [1.0]]), "language"), 0)
    assert points == {"loss/experience_00": 1000.0}


def test_numbers_have_two_digits_or_more():
    assert numbered(7) == "07"
    assert numbered(123) == "123"
    keys = stream_points(record_of(np.zeros((1, 101))), 0)
    assert "accuracy/experience_007" in keys
    assert "accuracy/experience_100" in keys


@pytest.mark.parametrize("i", [-1, 5])
def test_no_such_point(i):
    for points in (stream_points, expert_points):
        with pytest.raises(InputError, match="i = "):
            points(record_of(), i)


class TestExperts:
    loads = ({2: [load_of([1, 1, 2, 0], [2, 2, 36, 0], 30), load_of([3, 1, 0, 0], [8, 8, 4, 0])]},)

    def record(self, i=1):
        matrix = np.zeros((2, 2)) if i == 1 else np.zeros((3, 2))
        loads = [{}, *self.loads] if i == 1 else [{}, {}, *self.loads]
        cohorts = [{2: [(2, 0, True), (2, 1, False)]}] * (i + 1)
        return record_of(matrix, loads=loads, cohorts=cohorts)

    def test_over_the_experiences_seen(self):
        """At i = 1 only experience 0 counts, at i = 2 the sum of both, before any ratio."""
        for i, z, c, kept in [
            (1, [1, 1, 2, 0], [2, 2, 36, 0], 30),
            (2, [4, 2, 2, 0], [10, 10, 40, 0], 50),
        ]:
            points = expert_points(self.record(i), i)
            z, c = np.array(z), np.array(c)
            get = {key.removeprefix("experts/layer_02/"): value for key, value in points.items()}
            assert get["usage"] == 0.75
            assert get["unevenness"] == pytest.approx(entropy(z / z.sum(), np.full(4, 0.25)))
            assert get["entropy"] == pytest.approx(entropy(z) / np.log(4))
            assert get["effective_experts"] == pytest.approx(np.exp(entropy(z)))
            pairs = np.abs(c[:, None] - c[None, :]).sum()
            assert get["gini"] == pytest.approx(pairs / (2 * 16 * c.mean()))
            assert get["max_violation"] == pytest.approx(c.max() / c.mean() - 1)
            assert get["squared_cv"] == pytest.approx(c.var() / c.mean() ** 2)
            assert get["dead_fraction"] == 0.25
            assert get["drop_rate"] == pytest.approx(1 - kept / c.sum())
            assert get["num_experts"] == 4
            assert get["num_frozen"] == 2
            assert points["growth/num_experts"] == 4

    def test_before_training_only_sizes(self):
        points = expert_points(self.record(), 0)
        assert points == {
            "experts/layer_02/num_experts": 4,
            "experts/layer_02/num_frozen": 2,
            "growth/num_experts": 4,
        }

    def test_shock_and_several_layers(self):
        cohorts = [{1: [(4, 0, False)], 3: [(2, 0, False), (6, 1, False)]}]
        record = record_of(np.zeros((1, 1)), loads=[{}], cohorts=cohorts, shocks={0: -0.5})
        points = expert_points(record, 0)
        assert points["growth/num_experts"] == 12
        assert points["growth/shock"] == -0.5

    def test_dense_models_have_no_keys(self):
        assert expert_points(record_of(loads=[{}] * 5, cohorts=[{}] * 5), 4) == {}
        empty = [{0: [load_of([], [])] * 4}] * 5  # a layer that routes nothing
        assert expert_points(record_of(loads=empty, cohorts=[{}] * 5), 4) == {}


class TestObjective:
    def test_a_metric_at_the_last_point(self):
        assert objective(record_of()) == pytest.approx(0.7375)
        assert objective(record_of(R[:3]), "stream/average_accuracy") == 0.75
        assert objective(record_of(), "forgetting/experience_01") == pytest.approx(0.15)
        assert objective(record_of(), "cost/seconds", {"cost/seconds": 2.0}) == 2.0

    def test_language_is_negated(self):
        record = record_of(-np.array([[4.0, 5.0], [2.0, 4.5], [2.5, 1.0]]), "language")
        assert objective(record) == -1.75
        assert objective(record, "stream/average_loss") == 1.75

    def test_unknown_or_undefined(self):
        for name in ("stream/acuracy", "growth/shock"):
            with pytest.raises(InputError, match="stream/average_accuracy") as caught:
                objective(record_of(), name)
            assert caught.value.key == "objective"
            assert name in caught.value.got
        with pytest.raises(InputError):
            objective(record_of(R[:2]), "stream/forgetting")  # undefined after one experience
