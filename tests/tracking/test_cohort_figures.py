"""Figures of cohorts, of what forgetting is made of, and of depth: what they show, when there are none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from cl_moe.layers.routing import ExpertLoad
from cl_moe.tracking import figures
from cl_moe.tracking.figures.cohorts import by_birth
from cl_moe.tracking.figures.parts import decomposed
from cl_moe.tracking.record import Record

T = 4
COHORTS = {0: [(3, 0, True), (2, 1, False), (1, 1, False), (2, 3, False)], 2: [(4, 0, False)]}


def record_of(cohorts=COHORTS, long: bool = False) -> Record:
    random = np.random.default_rng(0)
    record = Record("classification", [f"{'of_a_long_name_' * 3 * long}{j}" for j in range(T)])
    for i in range(T + 1):
        record.rows.append(torch.from_numpy(random.uniform(0, 1, T)))
        loads = {}
        for block, members in cohorts.items():
            counts = [torch.from_numpy(random.integers(1, 9, sum(size for size, _, _ in members)))] * T
            loads[block] = [
                ExpertLoad(count * (j + 1.5), count, count.sum()) for j, count in enumerate(counts)
            ]
        record.loads.append(loads)
        record.cohorts.append(dict(cohorts))
        record.depths.append(
            {1: [ExpertLoad(torch.ones(1), torch.tensor([10]), torch.tensor(i + j)) for j in range(T)]}
        )
    record.rewound = {T: torch.from_numpy(random.uniform(0, 1, T - 1))}
    return record


def texts(figure: Figure) -> str:
    parts = [figure, *figure.subfigs]
    return " ".join(part.get_suptitle().replace("\n", " ") for part in parts)


def naive_shares(record: Record, block: int) -> dict[int, list[float]]:
    """Share of each experience's weight per birth, expert by expert."""
    births = [birth for size, birth, _ in record.cohorts[-1][block] for _ in range(size)]
    shares: dict[int, list[float]] = {birth: [0.0] * T for birth in births}
    for j, load in enumerate(record.loads[-1][block]):
        for expert, score in enumerate(load.score.tolist()):
            shares[births[expert]][j] += score / load.score.sum().item()
    return shares


def test_cohorts_of_one_birth_are_one_row():
    record = record_of()
    found = by_birth(record)
    assert set(found) == {0}, "block 2 has one birth only"
    share_CT, experts_C, births_C = found[0]
    assert (births_C.tolist(), experts_C.tolist()) == ([0, 1, 3], [3, 3, 2])
    naive = naive_shares(record, 0)
    assert share_CT == pytest.approx(np.array([naive[birth] for birth in (0, 1, 3)]))
    assert share_CT.sum(axis=0) == pytest.approx(np.ones(T))


def test_shares_kept_in_the_record_go_before_its_loads():
    record = record_of()
    kept = torch.tensor([[1.0] * T, [0.0] * T, [0.0] * T, [0.0] * T])
    record.shares = [{}] * T + [{0: kept}]
    assert by_birth(record)[0][0].tolist() == [[1.0] * T, [0.0] * T, [0.0] * T]


def image_of(figure: Figure, at: int = 0) -> np.ndarray:
    return np.asarray(figure.subfigs[at].axes[0].images[0].get_array())


def test_the_load_of_a_cohort_is_in_even_shares():
    record = record_of()
    shown, naive = image_of(figures.cohort_load(record)), naive_shares(record, 0)
    wanted = [[share / size * 8 for share in naive[birth]] for birth, size in ((0, 3), (1, 3), (3, 2))]
    assert shown == pytest.approx(np.array(wanted))


def test_the_leak_is_below_the_staircase():
    record = record_of()
    figure, naive = figures.leak_matrix(record), naive_shares(record, 0)
    leaks = [sum(shares[j] for birth, shares in naive.items() if birth > j) for j in range(T - 1)]
    assert f"{np.mean(leaks):.1%} of old experiences' weight leaks" in texts(figure)
    (stairs,) = [patch for patch in figure.subfigs[0].axes[0].patches if hasattr(patch, "get_data")]
    edges = stairs.get_data().values + 0.5
    assert edges.tolist() == [sum(birth <= j for birth in (0, 1, 3)) for j in range(T)]


def test_weights_and_routing_add_up_to_what_was_forgotten():
    record = record_of()
    weights, whole = decomposed(record, T)
    for j in range(T - 1):
        learnt, now = record.matrix[j + 1, j].item(), record.matrix[T, j].item()
        assert whole[j] == pytest.approx(learnt - now)
        assert weights[j] == pytest.approx(learnt - record.rewound[T][j].item())
    axes = figures.forgetting_parts(record).axes[0]
    heights = [[bar.get_height() for bar in container] for container in axes.containers[:2]]
    assert np.sum(heights, axis=0) == pytest.approx(whole)
    assert f"both {whole.mean():.3f}" in texts(axes.figure)


def test_depth_shares_are_over_what_was_trained():
    (line,) = figures.depth_shares(record_of()).axes[0].lines
    wanted = [sum(i + j for j in range(i)) / (10 * i) for i in range(1, T + 1)]
    assert line.get_xdata().tolist() == [1, 2, 3, 4]
    assert line.get_ydata() == pytest.approx(np.array(wanted))
    assert line.get_label() == "block 01"


NEW = {"cohort_load.png", "leak_matrix.png", "forgetting_parts.png", "depth_share.png"}


def test_what_is_there_is_drawn_the_same_each_time(tmp_path):
    one = figures.write_figures(record_of(long=True), tmp_path / "one")
    other = figures.write_figures(record_of(long=True), tmp_path / "other")
    assert {path.name for path in one} >= NEW
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in other]


def test_what_is_not_there_is_not_drawn(tmp_path):
    plain = record_of({2: [(4, 0, False)]})
    plain.depths, plain.rewound = [], {}
    untrained = Record("language", ["a"], rows=[torch.zeros(1)], loads=[{}], cohorts=[{}])
    for name, record in {"plain": plain, "untrained": untrained}.items():
        assert not {path.name for path in figures.write_figures(record, tmp_path / name)} & NEW


def test_an_experience_that_routed_nothing_leaves_its_column_empty():
    record = record_of()
    none = ExpertLoad(torch.zeros(8).double(), torch.zeros(8).long(), torch.tensor(0))
    record.loads[-1][0] = [none, *record.loads[-1][0][1:]]
    assert np.isnan(image_of(figures.leak_matrix(record))[:, 0]).all()
    record.loads[-1][0] = [none] * T
    assert figures.cohort_load(record) is None
