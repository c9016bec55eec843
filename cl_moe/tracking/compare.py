"""Many runs side by side: the command ``cl-moe-compare``, and the same as a function.

Only runs of one stream are compared with each other; several streams give several tables and folders.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from cl_moe.errors import InputError, RunFailedError

if TYPE_CHECKING:
    from cl_moe.tracking.compare_runs import Arm
    from cl_moe.tracking.compare_table import Comparison

_DEFAULT_URI = "sqlite:///mlflow.db"
_EPILOG = """Every figure and table is about one stream: runs of different streams are never averaged.
The newest finished run of an arm and its seeds counts; what is left out is said.
"""


class Result(NamedTuple):
    """A comparison per stream, the files that were written, and notes on what was left out."""

    comparisons: list[Comparison]
    files: list[Path]
    notes: list[str]


def compare(
    uri: str = _DEFAULT_URI,
    experiment: str = "cl-moe",
    *,
    group_by: Sequence[str] = ("arm",),
    metric: str | None = None,
    out: Path | str = "comparison",
    sweep: str | None = None,
    baseline: str | None = None,
) -> Result:
    """Reads the finished runs of an experiment and writes figures and ``summary.csv``.

    Args:
        uri: of the MLflow store.
        experiment: its name.
        group_by: params or tags whose values make an arm.
        metric: the key that arms are compared by; None: average accuracy, or average loss.
        out: the folder to write into, made if missing; with several streams, a folder in it for each.
        sweep: only runs whose tag ``sweep`` is this.
        baseline: the arm that the others are compared with; None: plain training without growth, if there
            is such an arm, else the first.

    Raises:
        InputError: no such store, experiment, finished run, key, metric or arm, or ``out`` is a file.
    """
    from cl_moe.tracking.compare_figures import draw_figures
    from cl_moe.tracking.compare_runs import by_stream, choose_baseline, read_runs
    from cl_moe.tracking.compare_table import compare_arms, write_csv
    from cl_moe.tracking.store import open_store

    client = open_store(uri, create=False, key="--uri")
    selection = read_runs(client, experiment, sweep)
    streams = by_stream(selection.runs, group_by)
    _check(streams, metric, baseline)
    folder = _folder(Path(out))
    comparisons, files, notes = [], [folder / "summary.csv"], list(selection.notes)
    for stream, arms in streams.items():
        comparisons.append(compare_arms(stream, arms, choose_baseline(arms, baseline), metric))
        place = folder if len(streams) == 1 else _folder(folder / _slug(stream))
        drawn, missing = draw_figures(client, arms, place)
        files, notes = [*files, *drawn], [*notes, *missing]
    write_csv(comparisons, folder / "summary.csv")
    return Result(comparisons, files, notes)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command: prints the tables, the files and how to open MLflow; exits 2 if the input is wrong.

    With ``--sync`` it delivers what runs could not, and compares nothing.
    """
    options = _parser().parse_args(arguments)
    uri = options.uri or _DEFAULT_URI
    try:
        if options.sync is not None:
            _sync(options)
            return
        result = compare(
            uri,
            options.experiment,
            group_by=[key.strip() for key in options.group_by.split(",") if key.strip()] or ["arm"],
            metric=options.metric,
            out=options.out,
            sweep=options.sweep,
            baseline=options.baseline,
        )
    except (InputError, RunFailedError) as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        print(error, file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
    _print(result, uri)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cl-moe-compare", description="Compares the arms of an experiment, from MLflow.", epilog=_EPILOG
    )
    option = parser.add_argument
    option("--experiment", default="cl-moe", metavar="NAME", help="MLflow experiment (default: %(default)s)")
    option("--uri", help=f"MLflow store: sqlite:///<file> or http(s)://<server> (default: {_DEFAULT_URI})")
    option(
        "--group-by", default="arm", metavar="KEY,...", help="params or tags that make an arm (default: arm)"
    )
    option("--metric", metavar="KEY", help="compare by this metric (default: average accuracy or loss)")
    option("--out", default="comparison", metavar="DIR", help="where to write (default: %(default)s)")
    option("--sweep", metavar="ID", help="only the runs of this multirun (their tag sweep)")
    option("--baseline", metavar="ARM", help="compare with this arm (default: naive, without growth)")
    option(
        "--sync",
        nargs="*",
        metavar="FOLDER",
        help="compare nothing: deliver what runs in these folders could not, when their store was away "
        "(default: outputs and multirun; --uri overrides the store of their configurations)",
    )
    return parser


def _sync(options: argparse.Namespace) -> None:
    from cl_moe.tracking.sync import command

    defaults = _parser().parse_args([])
    others = {key for key, value in vars(options).items() if value != getattr(defaults, key)}
    if more := sorted(others - {"sync", "uri"}):
        option = f"--{more[0].replace('_', '-')}"
        raise InputError(got=f"--sync and {option}", allowed="--sync with --uri alone", key=option)
    command(options.sync, options.uri)


def _print(result: Result, uri: str) -> None:
    from rich.console import Console

    from cl_moe.tracking.compare_table import cost_table, score_table

    # a pipe has no width: 100 columns read well in a log too
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)
    for one in result.comparisons:
        console.print(score_table(one))
        console.print(cost_table(one))
    for note in result.notes:
        console.print(note, markup=False)
    console.print("Written:", *map(str, result.files), sep="\n  ", markup=False, soft_wrap=True)
    if uri.startswith("sqlite"):
        program = Path(sys.executable).with_name("mlflow")
        command = str(program) if program.exists() else "mlflow"
        command = os.path.relpath(command) if program.is_relative_to(Path.cwd()) else command
        command += f" server --backend-store-uri {shlex.quote(uri)} --host 127.0.0.1 --port 5000"
        console.print(
            f"Open MLflow at http://127.0.0.1:5000 with:\n  {command}", markup=False, soft_wrap=True
        )
    else:
        console.print(f"Open MLflow: {uri}", markup=False, soft_wrap=True)


def _check(streams: dict[str, list[Arm]], metric: str | None, baseline: str | None) -> None:
    arms = [arm for found in streams.values() for arm in found]
    known = sorted({key for arm in arms for run in arm.runs for key in run.metrics})
    if metric is not None and metric not in known:
        near = get_close_matches(metric, known, n=5, cutoff=0.3)
        shown = near or [key for key in known if key.startswith("stream/")] or known
        raise InputError(
            got=f"the metric {metric!r}, which no run has", allowed=", ".join(shown), key="--metric"
        )
    names = list(dict.fromkeys(arm.name for arm in arms))
    if baseline is not None and baseline not in names:
        raise InputError(got=f"the arm {baseline!r}", allowed=", ".join(names), key="--baseline")


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


if __name__ == "__main__":
    main()
