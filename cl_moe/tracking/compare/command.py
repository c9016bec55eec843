"""The command ``cl-moe-compare``: its options, and what it prints."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cl_moe.errors import InputError, RunFailedError
from cl_moe.tracking.compare.whole import DEFAULT_URI, Result, compare

if TYPE_CHECKING:
    from rich.console import Console

    from cl_moe.tracking.compare.match import Match

_EPILOG = """Every figure and table is about one stream: runs of other streams, data, lengths or
definitions of the metrics are never averaged. The newest finished run of an arm and its seeds counts. What is
left out is said.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """The command: prints the tables, the files and how to open MLflow; exits 2 if the input is wrong.

    With ``--sync`` it delivers what runs could not, and compares nothing.
    """
    options = _parser().parse_args(arguments)
    try:
        if options.uri is not None and not options.uri.strip():
            allowed = "sqlite:///<file> or http(s)://<server>"
            raise InputError(got=repr(options.uri), allowed=allowed, key="--uri")
        if options.sync is not None:
            _sync(options)
            return
        result, match = _compare(options)
    except (InputError, RunFailedError) as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        print(error, file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
    _print(result, options.uri or DEFAULT_URI, match)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cl-moe-compare", description="Compares the arms of an experiment, from MLflow.", epilog=_EPILOG
    )
    option = parser.add_argument
    option("--experiment", default="cl-moe", metavar="NAME", help="MLflow experiment (default: %(default)s)")
    option("--uri", help=f"MLflow store: sqlite:///<file> or http(s)://<server> (default: {DEFAULT_URI})")
    option(
        "--group-by", default="arm", metavar="KEY,...", help="params or tags that make an arm (default: arm)"
    )
    option("--metric", metavar="KEY", help="compare by this metric (default: average accuracy or loss)")
    option("--out", default="comparison", metavar="DIR", help="where to write (default: %(default)s)")
    option("--sweep", metavar="ID", help="only the runs of this multirun (their tag sweep)")
    option("--baseline", metavar="ARM", help="compare with this arm (default: naive, without growth)")
    option("--mixed", action="store_true", help="average runs of several versions of the code, too")
    option("--match", metavar="COST", help="also at equal cost: cost/train_flops, cost/buffer_bytes, ...")
    option("--tolerance", type=float, default=0.1, help="of --match, as a share (default: %(default)s)")
    option(
        "--interval",
        choices=("bootstrap", "t"),
        default="bootstrap",
        help="(default: %(default)s; t where few)",
    )
    option(
        "--resamples", type=int, default=10_000, metavar="N", help="of bootstrap and test (default: 10000)"
    )
    option("--confidence", type=float, default=0.95, metavar="C", help="of intervals (default: %(default)s)")
    option(
        "--sync",
        nargs="*",
        metavar="FOLDER",
        help="compare nothing: deliver what runs in these folders could not, when their store was away "
        "(default: outputs and multirun; --uri overrides the store of their configurations)",
    )
    return parser


def _compare(options: argparse.Namespace) -> tuple[Result, Match | None]:
    from cl_moe.tracking.compare.match import Match, check_tolerance
    from cl_moe.tracking.compare.statistics import Inference

    check_tolerance(options.tolerance)
    match = Match(options.match, options.tolerance) if options.match is not None else None
    result = compare(
        options.uri or DEFAULT_URI,
        options.experiment,
        group_by=[key.strip() for key in options.group_by.split(",") if key.strip()],
        metric=options.metric,
        out=options.out,
        sweep=options.sweep,
        baseline=options.baseline,
        mixed=options.mixed,
        match=match,
        how=Inference(options.interval, options.resamples, options.confidence),
    )
    return result, match


def _sync(options: argparse.Namespace) -> None:
    from cl_moe.tracking.sync import command

    defaults = _parser().parse_args([])
    others = {key for key, value in vars(options).items() if value != getattr(defaults, key)}
    if more := sorted(others - {"sync", "uri"}):
        option = f"--{more[0].replace('_', '-')}"
        raise InputError(got=f"--sync and {option}", allowed="--sync with --uri alone", key=option)
    command(options.sync, options.uri)


def _print(result: Result, uri: str, match: Match | None) -> None:
    from rich.console import Console

    from cl_moe.tracking.compare.match import match_table
    from cl_moe.tracking.compare.table import cost_table, difference_table, score_table, variance_table

    # a pipe has no width: 100 columns read well in a log too
    console = Console(highlight=False, emoji=False, width=None if sys.stdout.isatty() else 100)
    for one in result.comparisons:
        console.print(score_table(one))
        console.print(difference_table(one))
        if any(row.orders > 1 for row in one.rows):
            console.print(variance_table(one))
        console.print(cost_table(one))
        if match is not None and any(row.matched for row in one.rows):
            console.print(match_table(one, match))
    for note in result.notes:
        console.print(f"- {note}", markup=False)
    console.print("Written:", *map(str, result.files), sep="\n  ", markup=False, soft_wrap=True)
    _print_server(console, uri, result.experiment_id)


def _print_server(console: Console, uri: str, experiment: str) -> None:
    """How to open MLflow, and the charts that each run prepares there (``cl_moe.tracking.sweeps.VIEWS``)."""
    address, lines = uri.rstrip("/"), [f"Open MLflow: {uri}"]
    if uri.startswith("sqlite"):
        address = "http://127.0.0.1:5000"
        program = Path(sys.executable).with_name("mlflow")
        command = str(program) if program.exists() else "mlflow"
        command = os.path.relpath(command) if program.is_relative_to(Path.cwd()) else command
        command += f" server --backend-store-uri {shlex.quote(uri)} --host 127.0.0.1 --port 5000"
        lines = [f"Open MLflow at {address} with:\n  {command}"]
    view = f"{address}/#/experiments/{experiment}/runs?compareRunsMode=CHART&viewStateShareKey="
    lines.append(f"Charts of the arms' means (runs in place of arms at the end: of every run):\n  {view}arms")
    console.print(*lines, sep="\n", markup=False, soft_wrap=True)
