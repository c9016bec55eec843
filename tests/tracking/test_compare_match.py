"""Arms at equal cost: who is within the tolerance, and scores at a budget."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from cl_moe.tracking.compare.match import Match, at_budget, match_arms, match_table
from cl_moe.tracking.compare.table import compare_arms
from tests.tracking.comparisons import FEW, arms_of, run_of


@given(st.lists(st.floats(0.1, 5), min_size=1, max_size=6), st.floats(0, 40), st.integers(0, 99))
def test_a_score_at_a_budget_lies_on_the_curve(steps: list[float], budget: float, draw: int) -> None:
    cost = np.cumsum([0, *steps])
    score = np.random.default_rng(draw).random(len(cost))
    got = at_budget(cost, score, budget)
    if budget >= cost[-1]:
        assert got == score[-1]
    else:
        k = int(np.searchsorted(cost, budget, side="right")) - 1
        share = (budget - cost[k]) / (cost[k + 1] - cost[k])
        assert got == pytest.approx(score[k] + share * (score[k + 1] - score[k]))


def matched(key: str, costs: dict[str, float | None], tolerance: float = 0.1) -> dict[str, object]:
    runs = [
        run_of(arm, init, value=0.5 + init, metrics={} if cost is None else {key: cost})
        for arm, cost in costs.items()
        for init in (0, 1)
    ]
    arms = arms_of(runs)
    one = compare_arms("digits", arms, arms[0], None, FEW)
    one = match_arms(one, arms, Match(key, tolerance), {}, 1, FEW)
    console = Console(file=io.StringIO(), width=100)
    console.print(match_table(one, Match(key, tolerance)))
    assert all(arm in console.file.getvalue() for arm in costs)  # type: ignore[attr-defined]
    return {row.arm: row.matched for row in one.rows}


def test_sizes_are_held_against_a_tolerance() -> None:
    found = matched("cost/buffer_bytes", {"naive": 100.0, "near": 110.0, "far": 110.1, "none": None})
    assert [found[arm].within for arm in ("naive", "near", "far")] == [True, True, False]  # type: ignore[attr-defined]
    assert found["none"] is None
    assert math.isnan(found["near"].score)  # type: ignore[attr-defined]


def test_a_baseline_that_costs_nothing_is_matched_by_nothing_else() -> None:
    found = matched("cost/buffer_bytes", {"naive": 0.0, "lwf": 0.0, "replay": 8.0}, tolerance=100)
    assert [found[arm].within for arm in ("naive", "lwf", "replay")] == [True, True, False]  # type: ignore[attr-defined]


def test_who_is_cheaper_than_the_baseline_is_taken_at_its_end_and_marked() -> None:
    arms = arms_of(
        [
            *(run_of(arm, k, metrics={"cost/seconds": 8.0}) for arm in ("naive", "cheap") for k in (0, 1)),
            run_of("lonely", 2, metrics={"cost/seconds": 8.0}),
        ]
    )
    rows = np.array([0.0, 0.5, 1.0])
    curves = {run.run_id: (rows * 8, rows) for run in arms[0].runs}
    curves |= {run.run_id: (rows * 4, rows / 2) for run in arms[1].runs}
    one = compare_arms("digits", arms, arms[0], None, FEW)
    one = match_arms(one, arms, Match("cost/seconds"), curves, -1, FEW)
    cheap = one.rows[1].matched
    assert cheap is not None
    assert (cheap.score, cheap.difference, cheap.spent_all) == (
        -0.5,
        0.5,
        False,
    )  # losses: the sign is turned
    console = Console(file=io.StringIO(), width=100)
    console.print(match_table(one, Match("cost/seconds")))
    assert "—*" not in console.file.getvalue(), "the lonely arm has no score to be marked"  # type: ignore[attr-defined]
    assert "-0.500*" in console.file.getvalue()  # type: ignore[attr-defined]
