"""Arms at the baseline's cost: which cost about the same, and what each had reached when it had spent it.

Legend: T experiences, R (T + 1, T).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cl_moe.errors import InputError
from cl_moe.tracking.compare.arms import Arm
from cl_moe.tracking.compare.left import Left
from cl_moe.tracking.compare.runs import ACCURACY, LOSS, Pair, Run, shortened
from cl_moe.tracking.compare.statistics import Inference, Interval, contrast, spread
from cl_moe.tracking.compare.table import Comparison, head, interval_text, short, signed, table_of

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from rich.table import Table

_ADDS_UP = {f"cost/{part}{what}" for part in ("eval_", "diagnostics_") for what in ("flops", "seconds")}
_ADDS_UP |= {"cost/train_flops", "cost/seconds", "cost/examples_seen"}
"""Costs that grow while a run trains, so that a run can be stopped at a budget; others are sizes."""

_ALWAYS = "cost/seconds"  # every run has it at every boundary
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
        check_tolerance(self.tolerance)


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
        few: too few of them for a bootstrap.
    """

    cost: float
    ratio: float
    within: bool
    score: float = _NONE
    spent_all: bool = False
    difference: float = _NONE
    interval: Interval = Interval(_NONE, _NONE)
    pairs: int = 0
    few: bool = False


Curves = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""``{run id: (cost at each boundary, score on all experiences there)}``."""


def check_tolerance(tolerance: float) -> None:
    """Refuse what is no share.

    Raises:
        InputError: below 0, infinite or NaN.
    """
    if not 0 <= tolerance < math.inf:
        raise InputError(got=f"{tolerance}", allowed="0 or more", key="--tolerance")


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
    """Cost and score at every boundary, for costs that add up: one query per run, or two.

    Runs whose cost was not written at every boundary are left out: branches, which begin in the middle.
    """
    if key not in _ADDS_UP:
        return {}
    curves = {}
    for one in left:
        if one.run.about.get("branch", "None") != "None" or key not in one.run.metrics:
            continue
        scores = one.matrix.scores.numpy().mean(axis=1)
        found = _history(client, one.run, key)
        # A cost that has no point where it is 0 is held against one that always has.
        steps = found if len(found) >= len(scores) else _history(client, one.run, _ALWAYS)
        costs = aligned(found, steps, len(scores))
        if costs is not None:
            curves[one.run.run_id] = (costs, scores)
    return curves


def aligned(costs: Mapping[int, float], steps: Iterable[int], boundaries: int) -> np.ndarray | None:
    """What was spent by each of so many boundaries, (boundaries,); None if there are more points than that.

    A point that is missing at the start is 0, since nothing was spent; inside, the one before it. Joint
    training writes nothing more once it has trained: its cost stands still from there.

    Args:
        costs: ``{step: cost}``.
        steps: at which there is a boundary, as far as it is known.
        boundaries: how many there are.

    >>> aligned({20: 5.0, 30: 7.0}, [0, 10, 20], 5)
    array([0., 0., 5., 7., 7.])
    """
    known = {*costs, *steps}
    if len(known) < boundaries:
        known.add(0)
    if not costs or len(known) > boundaries:
        return None
    spent = [0.0]
    for step in sorted(known):
        spent.append(costs.get(step, spent[-1]))
    return np.array([*spent[1:], *[spent[-1]] * (boundaries - len(known))])


def without_curve(arms: Sequence[Arm], curves: Curves, key: str) -> str:
    """A note that names the runs whose score at equal cost is not known; empty if there are none."""
    runs = [(arm.name, run) for arm in arms for run in arm.runs if key in run.metrics]
    names = [f"{arm} {'.'.join(run.seeds)}" for arm, run in runs if run.run_id not in curves]
    if key not in _ADDS_UP or not names:
        return ""
    return f"Not at equal cost, without a matrix that can be read, or branched off: {shortened(names)}."


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

    table = table_of(f"{match.key} held at that of {one.baseline} (bold: within {match.tolerance:.0%})")
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
            ended = found.pairs and not found.spent_all
            cells += [short(found.score) + ("*" if ended else ""), signed(found.difference)]
            is_base = row.difference is None
            cells.append("" if is_base else interval_text(found.interval, found.pairs, found.few))
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
        few=difference.few,
    )


def _history(client: MlflowClient, run: Run, key: str) -> dict[int, float]:
    """``{step: value}``."""
    from cl_moe.tracking.store import must

    points = must(client.tracking_uri, partial(client.get_metric_history, run.run_id, key))
    return {point.step: point.value for point in points}


def _by_pair(arm: Arm, curves: Curves) -> dict[Pair, list[tuple[np.ndarray, np.ndarray]]]:
    pairs: dict[Pair, list[tuple[np.ndarray, np.ndarray]]] = {}
    for run in arm.runs:
        if run.run_id in curves:
            pairs.setdefault(run.pair(arm.context), []).append(curves[run.run_id])
    return pairs
