"""A request to stop, SIGTERM or Ctrl-C: noted at once, obeyed where the state can be saved.

Signals belong to the process, so the note does too. While a run is ``deferring``, the first request is only
noted, and the run calls ``obey`` where it can stop in order: after an optimizer step, in an evaluation.
A second Ctrl-C does not wait. A sweep's first request goes to its jobs, where those are other processes.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from cl_moe.errors import InputError, RunFailedError, StopRequestedError

SAVE, STOP, INTERRUPT = 1, 2, 3
"""Wishes, as numbers: of several the largest counts."""

_noted: signal.Signals | None = None
_deferring = False
_silent = False
_at_work = False
_hand_on: Callable[[int], bool] | None = None


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


@contextmanager
def handing_on(tell: Callable[[int], bool]) -> Iterator[None]:
    """For a process whose jobs are others': the first request goes to them, and this process goes on waiting.

    Args:
        tell: hands them the signal; whether there was anybody to tell.
    """
    global _hand_on
    before, _hand_on = _hand_on, tell
    try:
        yield
    finally:
        _hand_on = before


@contextmanager
def working() -> Iterator[None]:
    """Catch requests in a process that runs a job for another one; noted for good: no further job begins.

    Who is in a hurry asks the other process. The warning of a scheduler that is about to take the machine
    away (submitit's SIGUSR2) is a request, too; once the run has stopped, submitit answers it as it would
    have done at once: it puts the job into the queue again, and this process ends.
    """
    global _at_work
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    warning = getattr(signal, "SIG" + os.environ.get("SUBMITIT_PREEMPT_SIGNAL", "USR2"), signal.SIGUSR2)
    answer = signal.getsignal(warning)
    for number in (signal.SIGTERM, signal.SIGINT, *([warning] if callable(answer) else [])):
        signal.signal(number, _note)
    _at_work = True
    try:
        yield
    except StopRequestedError:
        if _noted == warning and callable(answer):
            with suppress(Exception):  # it was put back too often
                answer(warning, None)
        raise
    finally:
        _at_work = False


def note(number: int) -> None:
    """Take a signal as heard, one that came before this process could hear it."""
    global _noted
    _noted = _noted or signal.Signals(number)


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


def _note(number: int, _: object) -> None:
    again = _noted is not None
    note(number)
    if _at_work and not _deferring and not again:
        raise StopRequestedError(keyboard=number == signal.SIGINT)


def _hear(number: int, _: object) -> None:
    global _noted
    again, _noted = _noted is not None, signal.Signals(number)
    if _hand_on is not None and not again and _hand_on(number):
        with suppress(Exception):
            print("stopping the jobs when their steps are done and saved", file=sys.stderr, flush=True)
        return
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
