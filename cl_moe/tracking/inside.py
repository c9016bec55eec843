"""Metric keys of what happens inside experiences, and of calibration.

Legend: T experiences, n evaluations inside one experience, NN: an index padded to two digits, or to more.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from io import StringIO
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

import cl_moe.metrics.functional as F  # noqa: N812
from cl_moe import files
from cl_moe.stream import is_loss
from cl_moe.tracking.diagnostics import numbered
from cl_moe.tracking.record import Record

ANYTIME = "anytime.csv"


def calibration_points(record: Record, i: int, errors_T: Tensor) -> dict[str, float]:
    """``calibration/experience_NN`` and their means at point i; nothing where there are no classes.

    ``stream/calibration_error`` is over the experiences trained so far, ``stream/old_calibration_error`` over
    those before the newest.

    Args:
        record: for the kind and the number of experiences.
        i: number of experiences trained.
        errors_T: (T,) expected calibration errors, NaN where nothing was answered.
    """
    if is_loss(record.kind):
        return {}
    T = len(record.names)
    points = {f"calibration/experience_{numbered(j, T)}": e for j, e in enumerate(errors_T.tolist())}
    points["stream/calibration_error"] = _mean(errors_T[:i].tolist())
    points["stream/old_calibration_error"] = _mean(errors_T[: max(i - 1, 0)].tolist())
    return points


def online_points(record: Record, i: int, mean: float) -> dict[str, float]:
    """The online score of the experience that was just trained, and the mean over those so far.

    Args:
        record: with the points of rows before i.
        i: number of experiences trained; nothing at 0.
        mean: of the newest experience; NaN if it had no training data.
    """
    if i == 0:
        return {}
    T, word = len(record.names), _word(record)
    sign = -1 if is_loss(record.kind) else 1
    keys = [f"online_{word}/experience_{numbered(j, T)}" for j in range(i)]
    values = [row.get(key, math.nan) for key, row in zip(keys, record.points[1:i], strict=False)]
    values.append(sign * mean)
    known = [value for value in values if math.isfinite(value)]
    return {keys[-1]: values[-1], f"stream/online_{word}": _mean(known)}


def open_anytime(record: Record, experience: int) -> tuple[Tensor, Tensor]:
    """The evaluations inside an experience, which is noted as one that was looked into."""
    nothing = torch.empty(0, dtype=torch.int64), torch.empty(0, experience + 1, dtype=torch.float64)
    return record.anytime.setdefault(experience, nothing)


def add_anytime(record: Record, experience: int, step: int, scores: Tensor) -> dict[str, float]:
    """Note an evaluation inside an experience; returns its metrics.

    Args:
        record: of the run.
        experience: index of the experience that is being trained.
        step: optimizer steps of the run.
        scores: (experience + 1,) float64, of it and of those before it.
    """
    steps, rows = open_anytime(record, experience)
    record.anytime[experience] = torch.cat([steps, torch.tensor([step])]), torch.cat([rows, scores[None]])
    return _anytime_row(record, scores)


def anytime_points(record: Record) -> Iterator[tuple[int, dict[str, float]]]:
    """Optimizer step and metrics of every evaluation inside experiences so far, oldest first."""
    for _, (steps, rows) in sorted(record.anytime.items()):
        for step, scores in zip(steps.tolist(), rows, strict=True):
            yield step, _anytime_row(record, scores)


def gap_points(record: Record, i: int) -> dict[str, float]:
    """min-ACC and WC-ACC (De Lange et al. 2023) at point i, or the same of the largest losses.

    Some NaN. Nothing where an experience behind the first was not looked into: rows alone miss what happens
    between them.
    """
    if not all(e in record.anytime for e in range(i)[1:]) or not record.anytime:
        return {}
    R, none = F.up_to(record.matrix, i), torch.empty(0, 1, dtype=torch.float64)
    scores = [record.anytime[e][1] if e in record.anytime else none for e in range(i)]
    anytime = [pad(found, (0, i - found.shape[1]), value=torch.nan) for found in scores]
    lowest, worst = F.min_accuracy(R, anytime).item(), F.worst_case_accuracy(R, anytime).item()
    if is_loss(record.kind):
        return {"stream/max_loss": -lowest, "stream/worst_case_loss": -worst}
    return {"stream/min_accuracy": lowest, "stream/worst_case_accuracy": worst}


def write_anytime(record: Record, path: Path) -> Path:
    """A line per evaluation inside an experience and experience: ``step``, ``experience``, ``score``.

    ``step`` counts the run's optimizer steps; the score is that of the matrix (minus a loss where it is one),
    on ``eval.samples`` examples.
    """
    text = StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["step", "experience", "score"])
    for _, (steps, scores) in sorted(record.anytime.items()):
        for step, row in zip(steps.tolist(), scores.tolist(), strict=True):
            table.writerows([step, j, repr(score)] for j, score in enumerate(row))
    files.write_atomically(path, text.getvalue().encode())
    return path


def _anytime_row(record: Record, scores: Tensor) -> dict[str, float]:
    T, word = len(record.names), _word(record)
    sign = -1 if is_loss(record.kind) else 1
    return {
        f"anytime_{word}/experience_{numbered(j, T)}": sign * value for j, value in enumerate(scores.tolist())
    }


def _word(record: Record) -> str:
    return "loss" if is_loss(record.kind) else "accuracy"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
