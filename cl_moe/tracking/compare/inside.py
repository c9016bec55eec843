"""Evaluations inside experiences (``eval.every``) of a finished run, as losses.

A loss is minus the score: of a classifier it is minus the accuracy.
"""

from __future__ import annotations

import csv
from pathlib import Path

from cl_moe.errors import InputError
from cl_moe.tracking.compare.runs import Run
from cl_moe.tracking.inside import ANYTIME


def folder_of(run: Run) -> Path:
    """Where a run's artifacts lie."""
    return Path(run.artifacts.removeprefix("file://"))


def inside_curve(run: Run) -> tuple[list[float], list[float]]:
    """Optimizer steps, and losses (mean over experiences), of a run's evaluations inside.

    Raises:
        InputError: it made none.
    """
    rows = _rows(run)
    return list(rows), [sum(losses) / len(losses) for losses in rows.values()]


def trade_curve(run: Run) -> tuple[list[float], list[float]]:
    """While the last experience is learned: losses on it, and losses on older ones (their mean).

    Raises:
        InputError: nobody looked, or there is one experience only.
    """
    rows = _rows(run)
    most = max(len(losses) for losses in rows.values())
    if most == 1:
        raise InputError(
            got=f"one experience in {run.run_id}", allowed="at least two to trade between", key="stream"
        )
    inside = [losses for losses in rows.values() if len(losses) == most]
    return [losses[-1] for losses in inside], [sum(losses[:-1]) / (most - 1) for losses in inside]


def _rows(run: Run) -> dict[float, list[float]]:
    path = folder_of(run) / ANYTIME
    rows: dict[float, list[float]] = {}
    if path.is_file():
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                rows.setdefault(float(row["step"]), []).append(-float(row["score"]))
    if not rows:
        raise InputError(got=f"no evaluations inside {run.run_id}", allowed="eval.every=20", key="eval.every")
    return rows
