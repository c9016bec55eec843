"""Metrics of what happens inside experiences, from records written by hand."""

from __future__ import annotations

import csv
import math

import pytest
import torch

from cl_moe.tracking import inside
from cl_moe.tracking.figures.gap import curve, stability_gap
from cl_moe.tracking.names import objective, stream_points
from cl_moe.tracking.record import Record


def record_of(T, kind="classification", rows=None, seed=0):
    draw = torch.Generator().manual_seed(seed)
    R = (
        torch.rand((T + 1, T), generator=draw, dtype=torch.float64)
        if rows is None
        else torch.tensor(rows).double()
    )
    if kind == "language":
        R = -3 * R
    names, every_row = [f"e{j}" for j in range(T)], range(T + 1)
    record = Record(kind, names, rows=list(R), steps=[10 * i for i in every_row])
    record.loads, record.cohorts = [{} for _ in every_row], [{} for _ in every_row]
    record.points = [{} for _ in every_row]
    return record


def looked_into(record, every=3, seed=1):
    """A score of every experience so far, every few steps."""
    draw = torch.Generator().manual_seed(seed)
    sign = -1 if record.kind == "language" else 1
    for e in range(len(record.names)):
        inside.open_anytime(record, e)
        for step in range(10 * e + every, 10 * e + 10, every):
            scores = sign * torch.rand(e + 1, generator=draw, dtype=torch.float64)
            inside.add_anytime(record, e, step, scores)
    return record


def min_accuracy_by_hand(record, T):
    """1/(T-1) sum over old j of the worst of all evaluations after j was learnt (De Lange et al. 2023)."""
    worst = []
    for j in range(T - 1):
        found = [record.rows[i][j].item() for i in range(j + 2, T + 1)]
        for e in range(j + 1, T):
            found += record.anytime[e][1][:, j].tolist()
        worst.append(min(found))
    return sum(worst) / (T - 1)


@pytest.mark.parametrize("kind", ["classification", "language"])
@pytest.mark.parametrize("T", [2, 3, 5])
def test_min_accuracy_sees_what_happened_between_boundaries(T, kind):
    record = looked_into(record_of(T, kind))
    for i in range(2, T + 1):
        lowest = min_accuracy_by_hand(record, i)
        worst = record.rows[i][i - 1].item() / i + (1 - 1 / i) * lowest
        points = stream_points(record, i)
        if kind == "language":
            assert points["stream/max_loss"] == pytest.approx(-lowest)
            assert points["stream/worst_case_loss"] == pytest.approx(-worst)
            assert (
                points["stream/max_loss"]
                >= max(-record.rows[i][j].item() for j in range(i - 1)) / (i - 1) - 1e-9
            )
            assert not any("accuracy" in key for key in points)
        else:
            assert points["stream/min_accuracy"] == pytest.approx(lowest)
            assert points["stream/worst_case_accuracy"] == pytest.approx(worst)


def test_at_one_experience_the_worst_case_is_undefined():
    points = stream_points(looked_into(record_of(1)), 1)
    assert not {"stream/min_accuracy", "stream/worst_case_accuracy"} & points.keys()


def test_without_a_look_inside_there_is_no_worst_case():
    """Rows alone miss the gap: their minimum would be another quantity under the same name."""
    assert "stream/min_accuracy" not in stream_points(record_of(3), 3)
    branched = record_of(3)  # from a parent that did not look
    inside.add_anytime(branched, 2, 23, torch.ones(3))
    assert "stream/min_accuracy" not in stream_points(branched, 3)


def test_a_worst_case_may_be_an_objective():
    record = looked_into(record_of(3))
    assert objective(record, "stream/min_accuracy") == pytest.approx(min_accuracy_by_hand(record, 3))


def test_points_of_an_evaluation_and_the_file_say_the_same(tmp_path):
    record = record_of(2)
    assert inside.add_anytime(record, 0, 4, torch.tensor([0.5])) == {"anytime_accuracy/experience_00": 0.5}
    found = inside.add_anytime(record, 1, 12, torch.tensor([0.25, 1 / 3], dtype=torch.float64))
    assert found == {"anytime_accuracy/experience_00": 0.25, "anytime_accuracy/experience_01": 1 / 3}
    with inside.write_anytime(record, tmp_path / inside.ANYTIME).open(newline="") as file:
        lines = list(csv.DictReader(file))
    expected = [(4, 0, 0.5), (12, 0, 0.25), (12, 1, 1 / 3)]
    assert [(int(row["step"]), int(row["experience"]), float(row["score"])) for row in lines] == expected
    losses = inside.add_anytime(record_of(1, "language"), 0, 4, torch.tensor([-2.5]))
    assert losses == {"anytime_loss/experience_00": 2.5}


def test_online_scores_average_over_the_experiences_that_were_trained():
    record = record_of(3)
    assert inside.online_points(record, 0, math.nan) == {}
    for i, score in ((1, 0.5), (2, math.nan), (3, 1.0)):  # the second had no training data
        found = inside.online_points(record, i, score)
        record.points[i] = {key: value for key, value in found.items() if math.isfinite(value)}
    assert record.points[1] == {"online_accuracy/experience_00": 0.5, "stream/online_accuracy": 0.5}
    assert record.points[2] == {"stream/online_accuracy": 0.5}
    assert record.points[3] == {"online_accuracy/experience_02": 1.0, "stream/online_accuracy": 0.75}
    language = record_of(1, "language")
    assert inside.online_points(language, 1, -2.0) == {
        "online_loss/experience_00": 2,
        "stream/online_loss": 2,
    }


def test_calibration_of_old_experiences_leaves_out_the_newest():
    record, errors = record_of(3), torch.tensor([0.1, 0.3, 0.8], dtype=torch.float64)
    points = inside.calibration_points(record, 2, errors)
    assert points["stream/calibration_error"] == pytest.approx(0.2)
    assert points["stream/old_calibration_error"] == pytest.approx(0.1)
    assert points["calibration/experience_02"] == 0.8
    for i in (0, 1):
        assert math.isnan(inside.calibration_points(record, i, errors)["stream/old_calibration_error"])
    assert inside.calibration_points(record_of(3, "language"), 2, errors) == {}


def test_the_curve_of_the_figure_goes_through_rows_and_evaluations():
    record = looked_into(record_of(3))
    steps, scores = curve(record, 1)
    assert steps.tolist() == [10, 13, 16, 19, 20, 23, 26, 29, 30]
    assert scores[[0, 4, 8]].tolist() == [record.rows[i][1].item() for i in (1, 2, 3)]
    assert scores[5:8].tolist() == record.anytime[2][1][:, 1].tolist()


@pytest.mark.parametrize("kind", ["classification", "language"])
@pytest.mark.parametrize("T", [1, 2])
def test_the_figure_marks_every_boundary_and_who_was_born(T, kind):
    record = looked_into(record_of(T, kind))
    record.cohorts = [{0: [(4, 0, False)]}, *[{0: [(4, 0, True), (2, 1, False)]}] * T]
    axes = stability_gap(record).axes[0]
    upright = {line.get_xdata()[0] for line in axes.lines if len(set(line.get_xdata())) == 1}
    assert {10.0 * i for i in range(T + 1)} <= upright
    assert [text.get_text() for text in axes.texts] == ["+2\n4 frozen"]
    assert stability_gap(record_of(T, kind)) is None
