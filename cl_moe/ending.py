"""How a run holds its folder, and what it says when it ends before its end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from cl_moe.checkpoint import Moment
from cl_moe.errors import InputError, RunFailedError, StopRequestedError


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


def add_what_was_kept(error: BaseException, folder: Path, saved: str | None) -> None:
    """Complete the message of a failure or a stop: what is on the disk, and how to go on.

    Args:
        error: others than a ``RunFailedError`` and a ``StopRequestedError`` are left as they are.
        folder: of the run.
        saved: the newest checkpoint's moment in words; None if there is none.
    """
    kept = f"the state {saved}, in {folder / 'checkpoints'}" if saved else "nothing"
    go_on = f"kept: {kept}\ngo on: cl-moe resume={folder}"
    if isinstance(error, RunFailedError):
        error.args = (f"{error}\n{go_on} when the cause is mended; other settings need a run of their own",)
    elif isinstance(error, StopRequestedError):
        error.args = (f"stopped on request\n{go_on}",)
