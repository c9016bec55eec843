"""The comparison from one end to the other: runs, tables, figures, report. Only one stream at a time."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from cl_moe.errors import InputError

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from cl_moe.tracking.compare.arms import Arm
    from cl_moe.tracking.compare.left import Left
    from cl_moe.tracking.compare.match import Match
    from cl_moe.tracking.compare.statistics import Inference
    from cl_moe.tracking.compare.table import Comparison

DEFAULT_URI = "sqlite:///mlflow.db"


class Result(NamedTuple):
    """A comparison per stream, the files that were written, notes on what was left out, MLflow's number."""

    comparisons: list[Comparison]
    files: list[Path]
    notes: list[str]
    experiment_id: str


class View(NamedTuple):
    """One stream as it is shown: its table, what its runs left for figures, and notes on both."""

    comparison: Comparison
    arms: list[Arm]
    left: list[Left]
    notes: list[str]


def compare(
    uri: str = DEFAULT_URI,
    experiment: str = "cl-moe",
    *,
    group_by: Sequence[str] = ("arm",),
    metric: str | None = None,
    out: Path | str = "comparison",
    sweep: str | None = None,
    baseline: str | None = None,
    mixed: bool = False,
    match: Match | None = None,
    how: Inference | None = None,
) -> Result:
    """Reads the finished runs of an experiment and writes figures, tables and the report.

    Args:
        uri: of the MLflow store.
        experiment: its name.
        group_by: params or tags whose values make an arm.
        metric: the key that arms are compared by; None: average accuracy, or average loss.
        out: the folder to write into, made if missing; with several streams, a folder in it for each.
        sweep: only runs whose tag ``sweep`` is this.
        baseline: the arm that the others are compared with; None: plain training without growth, if there
            is such an arm, else the first.
        mixed: average runs of several versions of the code; else the newest version of an arm counts.
        match: a cost that is held equal, too.
        how: interval, resamples, confidence, seed.

    Raises:
        InputError: no such store, experiment, finished run, key, metric or arm, an option out of its range,
            or ``out`` is a file.
    """
    from cl_moe.tracking.compare.arms import by_stream
    from cl_moe.tracking.compare.export import write_csv, write_latex
    from cl_moe.tracking.compare.figures import draw_figures
    from cl_moe.tracking.compare.report import write_report
    from cl_moe.tracking.compare.runs import read_runs
    from cl_moe.tracking.compare.statistics import Inference
    from cl_moe.tracking.store import open_store

    how = how or Inference()
    how.check()
    if match is not None:
        match.check()
    client = open_store(uri, create=False, key="--uri")
    selection = read_runs(client, experiment, sweep)
    streams, notes = by_stream(selection.runs, group_by, mixed)
    _check(streams, metric, baseline, match)
    folder = _folder(Path(out))
    views = [_view(client, stream, arms, metric, baseline, match, how) for stream, arms in streams.items()]
    files = [
        write_csv([view.comparison for view in views], folder / "summary.csv"),
        write_latex([view.comparison for view in views], how, folder / "summary.tex"),
    ]
    for view in views:
        place = folder if len(streams) == 1 else _folder(folder / _slug(view.comparison.stream))
        files += draw_figures(view.left, view.arms, place)
    notes = [*selection.notes, *notes]
    files.append(write_report(views, notes, experiment, how, match, folder / "report.html"))
    for view in views:
        title = f"{view.comparison.stream}: " if len(views) > 1 else ""
        notes += [title + note for note in view.notes]
    return Result([view.comparison for view in views], files, notes, selection.experiment_id)


def _view(
    client: MlflowClient,
    stream: str,
    arms: list[Arm],
    metric: str | None,
    baseline: str | None,
    match: Match | None,
    how: Inference,
) -> View:
    """One stream: its table, its artifacts, and what to know about them."""
    from cl_moe.stream import is_loss
    from cl_moe.tracking.compare.arms import choose_baseline, kind_of, notes_on, without_common_words
    from cl_moe.tracking.compare.left import read_left
    from cl_moe.tracking.compare.match import match_arms, read_curves, without_curve
    from cl_moe.tracking.compare.table import compare_arms

    arms, common = without_common_words(arms)
    base = choose_baseline(arms, baseline)
    arms = sorted(arms, key=lambda arm: arm is not base)  # one order, so one colour each, everywhere
    one = compare_arms(stream, arms, base, metric, how)._replace(common=common)
    notes = [f"Every arm has {common}, which the names leave out."] if common else []
    notes += notes_on(arms, base, one.metric)
    notes += _weak(one)
    left, missing = read_left(client, arms)
    if match is not None:
        curves = read_curves(client, left, match.key)
        one = match_arms(one, arms, match, curves, -1 if is_loss(kind_of(arms)) else 1, how)
        if not any(row.matched for row in one.rows):
            notes.append(f"No arm can be matched: the baseline, or every run, is without {match.key}.")
        elif dropped := without_curve(arms, curves, match.key):
            notes.append(dropped)
    notes += _not_drawn(left)
    return View(one, arms, left, [*notes, *missing])


def _not_drawn(left: Sequence[Left]) -> list[str]:
    """What has no room in a figure."""
    from cl_moe.tracking.figures.arms import MOST_PANELS

    num = len({run.arm for run in left})
    return [f"accuracy_matrix shows {MOST_PANELS} of {num} arms."] if num > MOST_PANELS else []


def _weak(one: Comparison) -> list[str]:
    """What the numbers cannot say."""
    from cl_moe.tracking.compare.arms import shortened
    from cl_moe.tracking.compare.statistics import FEW_PAIRS

    notes = []
    if any(
        row.difference is not None and row.difference.pairs > 1 and row.difference.few for row in one.rows
    ):
        notes.append(
            f"~: Student's interval, since fewer than {FEW_PAIRS} pairs (or orders, or seeds) are too few "
            "for a bootstrap; p of fewer than 6 pairs that do not cross cannot be under .05."
        )
    clipped = [f"{row.arm} ({' '.join(row.variance.clipped)})" for row in one.rows if row.variance.clipped]
    if clipped:
        notes.append(f"Negative estimates of a variance are shown as 0: {shortened(clipped)}.")
    if all(row.orders < 2 for row in one.rows):
        notes.append("One order of the experiences: nothing here says how much another order would change.")
    return notes


def _check(
    streams: dict[str, list[Arm]], metric: str | None, baseline: str | None, match: Match | None
) -> None:
    from cl_moe.tracking.compare.runs import shortened

    arms = [arm for found in streams.values() for arm in found]
    known = sorted({key for arm in arms for run in arm.runs for key in run.metrics})
    for option, key in (("--metric", metric), ("--match", match.key if match else None)):
        if key is not None and key not in known:
            kind = "cost/" if option == "--match" else "stream/"
            near = get_close_matches(key, known, n=3, cutoff=0.6)
            others = [name for name in known if name.startswith(kind) and name not in near]
            allowed = shortened([*near, *(others or known)], 12) or "none"
            raise InputError(got=f"the metric {key!r}, which no run has", allowed=allowed, key=option)
    names = list(dict.fromkeys(arm.name for arm in arms))
    shown_names = {one.name for found in streams.values() for one in _named(found)}
    if baseline is not None and baseline not in {*names, *shown_names}:
        raise InputError(got=f"the arm {baseline!r}", allowed=", ".join(names), key="--baseline")


def _named(arms: list[Arm]) -> list[Arm]:
    from cl_moe.tracking.compare.arms import without_common_words

    return without_common_words(arms)[0]


def _folder(path: Path) -> Path:
    why = "not writable"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = error.strerror or type(error).__name__
    if not (path.is_dir() and os.access(path, os.W_OK)):
        raise InputError(got=f"{path}: {why}", allowed="a folder to write into", key="--out")
    return path


def _slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name).strip("_.") or "stream"
