"""A request to stop, SIGTERM or Ctrl-C: noted at once, obeyed where the state can be saved.

Signals belong to the process, so the note does too. While a run is ``deferring``, the first request is only
noted, and the run calls ``obey`` where it can stop in order: after an optimizer step, in an evaluation.
A second Ctrl-C does not wait.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from cl_moe.errors import InputError, RunFailedError, StopRequestedError

SAVE, STOP, INTERRUPT = 1, 2, 3
"""Wishes, as numbers: of several the largest counts."""

_noted: signal.Signals | None = None
_deferring = False
_silent = False


@contextmanager
def listening() -> Iterator[None]:
    """Catch SIGTERM and SIGINT, and give them back at the end; in a main thread, as others may not."""
    global _noted
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _noted = None
    before = {number: signal.signal(number, _hear) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _noted = None


@contextmanager
def deferring() -> Iterator[None]:
    """Leave the moment to the block, which calls ``obey``."""
    global _deferring
    before, _deferring = _deferring, True
    try:
        yield
    finally:
        _deferring = before


def be_silent() -> None:
    """Say nothing when asked, in a process whose parent says it."""
    global _silent
    _silent = True


def asked() -> bool:
    """Whether somebody asked."""
    return _noted is not None


def wish() -> int:
    """What was asked for, as a number: 0 for nothing, ``STOP``, or ``INTERRUPT`` for Ctrl-C."""
    return 0 if _noted is None else INTERRUPT if _noted == signal.SIGINT else STOP


def obey(wished: int | None = None) -> None:
    """Stop here, if it was asked for.

    Args:
        wished: what ranks that stop together have agreed on; None: what this process was asked.

    Raises:
        StopRequestedError: it was.
    """
    wished = wish() if wished is None else wished
    if wished >= STOP:
        raise StopRequestedError(keyboard=wished == INTERRUPT)


def behind(error: BaseException) -> BaseException:
    """The request to stop that an error hides, or the error: an interrupted clean-up may fail by itself."""
    link: BaseException | None = error
    while link is not None and not isinstance(link, InputError | RunFailedError):
        if isinstance(link, StopRequestedError | KeyboardInterrupt):
            return link
        link = link.__cause__ or link.__context__
    return error


def _hear(number: int, _: object) -> None:
    global _noted
    again, _noted = _noted is not None, signal.Signals(number)
    if number == signal.SIGINT and (again or not _deferring):
        raise KeyboardInterrupt
    if again:
        return  # a scheduler that repeats itself; what it asked for is on its way
    if not _deferring:
        raise StopRequestedError
    if _silent:
        return
    with suppress(Exception):  # whoever read it may be gone, or be reading a line that is half written
        print("stopping when this step is done and saved (Ctrl-C: at once)", file=sys.stderr, flush=True)
