"""How a run holds its folder, and what it says when it ends before its end."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import lightning as L  # noqa: N812
from filelock import FileLock, Timeout

from cl_moe import failures, memory, stopping
from cl_moe.checkpoint import Moment
from cl_moe.errors import InputError, RunFailedError, StopRequestedError
from cl_moe.learner import Learner
from cl_moe.stream import Stream
from cl_moe.tracking.tracker import Tracker


class Run(Protocol):
    """What is told of a run."""

    learner: Learner
    trainer: L.Trainer
    tracker: Tracker
    stream: Stream
    folder: Path
    go_on: Path | None
    params: Mapping[str, object]
    saved: Moment | None


@contextmanager
def one_writer(folder: Path) -> Iterator[None]:
    """Hold a run's folder, made if it is missing.

    Raises:
        InputError: a living process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(folder / ".lock").acquire(blocking=False)
    except Timeout:
        raise InputError(
            got=f"{folder}, which another process is writing to",
            allowed="one live writer per run folder",
            key="resume (or output_dir)",
        ) from None
    with lock:
        yield


def where(moment: Moment, total: int) -> str:
    """A moment in words.

    >>> where(Moment(2, 40), total=6)
    'after experience 2 of 6 and 40 batches of the next'
    """
    inside = f" and {moment.batches} batches of the next" if moment.batches else ""
    return f"after experience {moment.boundary} of {total}{inside}"


@contextmanager
def told(run: Run) -> Iterator[None]:
    """Close a run's tracker however the block ends; an error gets its cause, what is kept and how to go on.

    Raises:
        StopRequestedError: SIGTERM or Ctrl-C, obeyed.
        RunFailedError: a failure with a name; what has none goes through as it is.
    """
    try:
        with stopping.deferring():
            yield
    except BaseException as error:
        if isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt):
            error = error.__context__  # Lightning exits by itself when the user stops a fit
        held = memory.holdings(run.learner.model, run.learner.strategies, run.trainer.optimizers)
        failure = failures.named(error, run.params, held, run.folder) or error
        stopped = isinstance(error, KeyboardInterrupt | StopRequestedError)
        what = "stopped on request" if stopped else f"{type(failure).__name__}: {failure}"
        run.tracker.tag("failure", f"at step {run.trainer.global_step}: {what}")
        run.tracker.finish("stopped" if stopped else "failed")
        _add_what_was_kept(failure, run)
        raise failure from (error.__cause__ if failure is error else error)
    run.tracker.finish("finished")


def _add_what_was_kept(error: BaseException, run: Run) -> None:
    kept = "nothing"
    if run.saved is not None:
        kept = f"the state {where(run.saved, len(run.stream))}, in {run.folder / 'checkpoints'}"
    lines = [f"kept: {kept}", f"go on: cl-moe resume={shlex.quote(str(run.go_on or run.folder))}"]
    if isinstance(error, RunFailedError):
        lines = [str(error), *lines, "(when the cause is mended; other settings need a run of their own)"]
    elif isinstance(error, KeyboardInterrupt | StopRequestedError):
        lines = ["stopped on request", *lines]
    else:
        return
    error.args = ("\n".join(lines),)
