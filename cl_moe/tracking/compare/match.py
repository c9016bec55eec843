"""Arms at the baseline's cost: which cost about the same, and what each had reached when it had spent it.

Legend: T experiences, R (T + 1, T).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cl_moe.errors import InputError
from cl_moe.tracking.compare.arms import Arm
from cl_moe.tracking.compare.left import Left
from cl_moe.tracking.compare.runs import ACCURACY, LOSS, Pair
from cl_moe.tracking.compare.statistics import Inference, Interval, contrast, spread
from cl_moe.tracking.compare.table import Comparison, head, interval_text, new_table, short, signed

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from rich.table import Table

_ADDS_UP = {f"cost/{part}{what}" for part in ("eval_", "diagnostics_") for what in ("flops", "seconds")}
_ADDS_UP |= {"cost/train_flops", "cost/seconds", "cost/examples_seen"}
"""Costs that grow while a run trains, so that a run can be stopped at a budget; others are sizes."""

_NONE = float("nan")


class Match(NamedTuple):
    """What is held equal.

    Args:
        key: a ``cost/*`` metric.
        tolerance: how far the cost may lie from the baseline's, as a share of it; >= 0.
    """

    key: str
    tolerance: float = 0.1

    def check(self) -> None:
        """Refuse what is no cost, or no tolerance.

        Raises:
            InputError: with the option to change.
        """
        if not self.key.startswith("cost/"):
            raise InputError(got=f"{self.key!r}", allowed="a cost, such as cost/train_flops", key="--match")
        if not 0 <= self.tolerance < math.inf:
            raise InputError(got=f"{self.tolerance}", allowed="0 or more", key="--tolerance")


class Matched(NamedTuple):
    """An arm at the baseline's cost.

    Args:
        cost: mean of the arm.
        ratio: to the baseline's mean; NaN if that is 0 and the arm's is not.
        within: the ratio is within the tolerance of 1.
        score: mean over runs of the score on all T experiences when the run had spent the baseline's cost in
            the same pair; NaN for costs that do not add up.
        spent_all: every run of the arm costs at least as much as its partner, so none stands at its end.
        difference: of ``score`` from the baseline's at its end.
        interval: of ``difference``.
        pairs: runs that were interpolated.
    """

    cost: float
    ratio: float
    within: bool
    score: float = _NONE
    spent_all: bool = False
    difference: float = _NONE
    interval: Interval = Interval(_NONE, _NONE)
    pairs: int = 0


Curves = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""``{run id: (cost at each boundary, score on all experiences there)}``."""


def match_arms(
    one: Comparison, arms: Sequence[Arm], match: Match, curves: Curves, sign: int, how: Inference
) -> Comparison:
    """The comparison with ``matched`` in every row that has a cost.

    Args:
        one: of these arms.
        arms: of one stream.
        match: what is held equal.
        curves: of the runs that have them; empty for costs that do not add up.
        sign: 1 if scores are shown as they are, -1 if as losses.
        how: the interval.
    """
    named = {arm.name: arm for arm in arms}
    if one.baseline is None:
        return one
    base = named[one.baseline]
    rows = []
    for row in one.rows:
        arm = named[row.arm]
        cost, budget = (spread(list(which.values(match.key).values())).mean for which in (arm, base))
        if math.isnan(cost) or math.isnan(budget):
            rows.append(row)
            continue
        ratio = cost / budget if budget > 0 else (1.0 if cost == budget else _NONE)
        within = abs(ratio - 1) <= match.tolerance + 1e-12
        matched = Matched(cost, ratio, within)
        rows.append(row._replace(matched=_spent(matched, arm, base, curves, sign, how)))
    return one._replace(rows=rows)


def read_curves(client: MlflowClient, left: Sequence[Left], key: str) -> Curves:
    """Cost and score at every boundary, for costs that add up: one query per run.

    Runs whose cost was not written at every boundary are left out: branches, which begin in the middle.
    """
    if key not in _ADDS_UP:
        return {}
    from cl_moe.tracking.store import must

    curves = {}
    for one in left:
        if one.run.about.get("branch", "None") != "None" or key not in one.run.metrics:
            continue
        history = must(client.tracking_uri, partial(client.get_metric_history, one.run.run_id, key))
        costs = [value for _, value in sorted({point.step: point.value for point in history}.items())]
        scores = one.matrix.scores.numpy().mean(axis=1)
        # Joint training writes nothing more once it has trained: its cost stands still from there.
        if costs and len(costs) <= len(scores):
            padded = [*costs, *[costs[-1]] * (len(scores) - len(costs))]
            curves[one.run.run_id] = (np.array(padded), scores)
    return curves


def at_budget(cost: np.ndarray, score: np.ndarray, budget: float) -> float:
    """The score when ``budget`` was spent: linear between boundaries, the last one where less is spent.

    >>> at_budget(np.array([0.0, 10, 20]), np.array([0.1, 0.5, 0.7]), 15), at_budget(
    ...     np.array([0.0, 10, 10]), np.array([0.1, 0.5, 0.6]), 30)
    (0.6, 0.6)
    """
    return float(score[-1]) if budget >= cost[-1] else float(np.interp(budget, cost, score))


def match_table(one: Comparison, match: Match) -> Table:
    """Cost against the baseline's, and the score at that cost; arms within the tolerance are bold."""
    from rich.text import Text

    table = new_table(f"{match.key} held at that of {one.baseline} (bold: within {match.tolerance:.0%})")
    average = LOSS if LOSS in one.rows[0].metrics else ACCURACY
    adds_up = any(row.matched is not None and row.matched.pairs for row in one.rows)
    heads = [match.key.removeprefix("cost/"), "ratio", head(average)]
    heads += ["at equal cost", "difference", "interval (pairs)"] if adds_up else []
    for name in heads:
        table.add_column(name, justify="right")
    for row in one.rows:
        found = row.matched
        if found is None:
            table.add_row(Text(row.arm), *["—"] * len(heads))
            continue
        cells = [
            short(found.cost),
            short(found.ratio),
            short(row.metrics[average].mean if average in row.metrics else _NONE),
        ]
        if adds_up:
            cells += [short(found.score) + ("" if found.spent_all else "*"), signed(found.difference)]
            interval = (
                ""
                if row.difference is None
                else interval_text(row.difference._replace(shown=found.interval, pairs=found.pairs))
            )
            cells.append(interval)
        table.add_row(*(Text(cell, style="bold" if found.within else "") for cell in (row.arm, *cells)))
    return table


def _spent(matched: Matched, arm: Arm, base: Arm, curves: Curves, sign: int, how: Inference) -> Matched:
    """``matched`` with the score at the budget of each pair."""
    theirs = _by_pair(base, curves)
    ours: dict[Pair, float] = {}
    finals: dict[Pair, float] = {}
    spent_all = True
    for pair, found in _by_pair(arm, curves).items():
        if pair not in theirs:
            continue
        budget = float(np.mean([cost[-1] for cost, _ in theirs[pair]]))
        ours[pair] = sign * float(np.mean([at_budget(cost, score, budget) for cost, score in found]))
        finals[pair] = sign * float(np.mean([score[-1] for _, score in theirs[pair]]))
        spent_all = spent_all and all(cost[-1] >= budget for cost, _ in found)
    if not ours:
        return matched
    difference = contrast(ours, finals, how)
    return matched._replace(
        score=spread(list(ours.values())).mean,
        spent_all=spent_all,
        difference=difference.mean,
        interval=difference.shown,
        pairs=difference.pairs,
    )


def _by_pair(arm: Arm, curves: Curves) -> dict[Pair, list[tuple[np.ndarray, np.ndarray]]]:
    pairs: dict[Pair, list[tuple[np.ndarray, np.ndarray]]] = {}
    for run in arm.runs:
        if run.run_id in curves:
            pairs.setdefault(run.pair(arm.context), []).append(curves[run.run_id])
    return pairs
