"""Keys of loads and choices, their values computed again by hand; the leak in its file."""

from __future__ import annotations

import csv
import math

import numpy as np
import pytest
import torch

from cl_moe.layers.routing import ExpertLoad
from cl_moe.metrics.functional import Choices
from cl_moe.tracking import artifacts, diagnostics
from cl_moe.tracking.names import all_points, expert_points, stream_points
from cl_moe.tracking.record import Record

Z = np.array([[3.0, 1, 4, 0], [0, 2, 1, 5], [1, 1, 1, 1]])  # experiences by experts
BORN = [(2, 0, True), (1, 1, True), (1, 2, False)]


@pytest.fixture
def record() -> Record:
    """Three experiences, two of them trained."""
    loads = [ExpertLoad(torch.tensor(z), torch.tensor(z).long(), torch.tensor(int(z.sum()))) for z in Z]
    made = Record("classification", ["a", "b", "c"])
    made.rows = [torch.tensor([0.1, 0.2, 0.3]).double()] * 3
    made.loads, made.cohorts = [{5: loads}] * 3, [{5: BORN}] * 3
    made.shares = [diagnostics.shares(made, i) for i in range(3)]
    return made


def test_loads_by_cohort_leak_and_information(record):
    points = diagnostics.load_metrics(record, 2)
    seen = Z[:2].sum(axis=0)
    for cohort, experts in enumerate(([0, 1], [2], [3])):
        share = points[f"experts/layer_05/load_cohort_{cohort:02d}"]
        assert share == pytest.approx(seen[experts].sum() / seen.sum())
    # Experience 0 alone is old; experts 2 and 3 were born after it.
    assert points["routing/layer_05/leak"] == pytest.approx(Z[0, 2:].sum() / Z[0].sum())
    counts = torch.from_numpy(Z[:2]).long()
    assert points["routing/layer_05/task_information"] == diagnostics.F.task_information(counts).item()
    assert diagnostics.load_metrics(record, 0) == {}
    first = expert_points(record, 1)
    assert not [key for key in first if "leak" in key or "information" in key], "nothing is old yet"


def test_one_cohort_has_no_share_of_its_own(record):
    record.cohorts = [{5: [(4, 0, False)]}] * 3
    points = diagnostics.load_metrics(record, 2)
    assert not [key for key in points if "cohort" in key]
    assert points["routing/layer_05/leak"] == 0


def test_latency_is_a_mean_over_batches():
    peaks = {0: torch.tensor([[3.0, 2.0], [4.0, 1.0], [9.0, 1.0]]), 2: torch.zeros(3, 2)}
    assert diagnostics.latencies(peaks, 2) == {"experts/layer_00/latency": 7 / 3}
    assert diagnostics.latencies(peaks, 0) == {}


def test_changes_of_trained_experiences_only():
    def tokens(*experts: int) -> Choices:
        return Choices(torch.tensor(experts).int(), torch.ones(len(experts)).int(), len(experts))

    now = [{0: tokens(1, 2, 3)}, {0: tokens(1, 1, 1)}, {0: tokens(0, 0, 0)}]
    then = {0: {0: tokens(1, 2, 0)}, 1: {0: tokens(1, 1, 1)}}
    assert diagnostics.changes(now, then, 3) == {
        "routing/layer_00/drift_experience_00": pytest.approx(1 / 3),
        "routing/layer_00/saturation_experience_00": pytest.approx(2 / 3),
        "routing/layer_00/drift_experience_01": 0,
        "routing/layer_00/saturation_experience_01": 1,
    }
    assert diagnostics.changes(now, {0: {0: tokens(1, 2)}}, 3) == {}, "of fewer examples"
    assert diagnostics.changes(now, {0: {7: tokens(1, 2, 3)}}, 3) == {}
    long = diagnostics.changes(now, then, 120)
    assert "routing/layer_00/drift_experience_000" in long


def test_kept_points_stand_for_loads_that_are_gone(record):
    whole = expert_points(record, 2)
    record.points = [diagnostics.load_metrics(record, i) for i in range(3)]
    record.loads = [{}, {}, {}]
    assert expert_points(record, 2) == whole
    assert len(whole) > 10


def test_the_two_parts_of_forgetting_and_intransigence(record):
    R = np.array([[0.1, 0.2, 0.3], [0.9, 0.2, 0.3], [0.6, 0.8, 0.3], [0.5, 0.7, 0.6]])
    record.rows = [torch.from_numpy(row) for row in R]
    record.rewound = {3: torch.tensor([0.8, 0.75], dtype=torch.float64)}
    record.cumulative = torch.from_numpy(R) + 0.25
    points = stream_points(record, 3)
    assert points["forgetting_weights/experience_00"] == pytest.approx(0.1)
    assert points["forgetting_routing/experience_00"] == pytest.approx(0.3)
    assert points["forgetting_weights/experience_01"] == pytest.approx(0.05)
    assert points["stream/forgetting_weights"] == pytest.approx(0.075)
    total = points["stream/forgetting_weights"] + points["stream/forgetting_routing"]
    assert total == pytest.approx(-points["stream/backward_transfer"], abs=1e-15)
    assert points["stream/intransigence"] == pytest.approx(0.25)
    assert not [key for key in stream_points(record, 2) if "forgetting_" in key]
    record.rewound = {3: torch.tensor([math.nan, 0.75], dtype=torch.float64)}
    assert "stream/forgetting_weights" not in stream_points(record, 3)
    assert "forgetting_weights/experience_01" in stream_points(record, 3)


def test_the_leak_is_a_file(record, tmp_path):
    with artifacts.write_leak(record, tmp_path / "leak.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 3 * 3 * 3  # rows, cohorts, experiences
    for line in lines:
        z = Z[int(line["experience"])]
        experts = ([0, 1], [2], [3])[int(line["cohort"])]
        assert float(line["share"]) == pytest.approx(z[experts].sum() / z.sum())
        assert int(line["birth"]) == BORN[int(line["cohort"])][1]
        assert line["layer"] == "5"
    leak = np.mean([float(e["share"]) for e in lines[:9] if int(e["birth"]) > int(e["experience"]) == 0]) * 2
    assert leak == pytest.approx(all_points(record, 2)["routing/layer_05/leak"])


def test_how_many_experts_compute_a_token_is_counted_on_real_ones():
    draw = torch.Generator().manual_seed(0)
    size_S = torch.randint(0, 8, (50,), generator=draw)
    size_S[::7] = 0  # padding, or dropped
    kept = Choices(torch.zeros(int(size_S.sum())).int(), size_S.int(), 46)
    sizes = size_S.tolist()
    want = [46 - sum(s > 0 for s in sizes), *(sum(s in (a, a + 1) for s in sizes) for a in (1, 3))]
    found = diagnostics.takers([{0: kept, 1: kept}, {0: kept}], [0])
    names = ("none", "one_two", "three_four", "more")
    assert list(found) == [f"experts/layer_00/tokens_{name}" for name in names]
    assert list(found.values()) == pytest.approx([n / 46 for n in (*want, sum(s > 4 for s in sizes))])
    assert diagnostics.takers([], [0]) == {}
