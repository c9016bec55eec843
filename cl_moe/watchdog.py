"""A hung run ends with a message that says where it hangs, instead of waiting for ever."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType

from cl_moe.errors import RunFailedError
from cl_moe.failures import part_of, place_of, walk

TICKS = 10
"""Looks within the time allowed. Looks are counted, not seconds: a process that was suspended (Ctrl-Z, a
laptop that sleeps) has missed its looks, and is not taken for one that hangs."""


class Watchdog:
    """Fails the run if ``alive`` is not called for so long: ``with Watchdog(30) as watchdog: ...``.

    A thread looks ``TICKS`` times in the time allowed whether anything ended since. If not, it notes where
    the main thread stands and interrupts it with SIGALRM, whose handler raises ``RunFailedError`` there, so
    that the run closes in order. A main thread that does not come back from foreign code in as long again
    cannot be asked: then the message is printed and the process ends with status 1. The checkpoints are whole
    in both cases. Code that holds Python's lock (the GIL) while it hangs stops the watchdog too.

    Outside the main thread, and where the system cannot interrupt a thread, it does nothing.

    Args:
        minutes: without any step after which the run counts as hung, above 0; None: never.
    """

    def __init__(self, minutes: float | None) -> None:
        self.minutes = minutes
        self._beats = 0
        self._asked = -1  # the beat at which the main thread was interrupted last
        self._message = ""
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._main = threading.main_thread().ident or 0

    def alive(self) -> None:
        """Something ended: a step, a batch, a file. Costs an addition."""
        self._beats += 1

    def __enter__(self) -> Watchdog:
        on_main = threading.current_thread() is threading.main_thread()
        if self.minutes is not None and on_main and hasattr(signal, "pthread_kill"):
            self._closed.clear()
            self._before = signal.signal(signal.SIGALRM, self._raise)
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            signal.signal(signal.SIGALRM, self._before)

    def _watch(self) -> None:
        assert self.minutes is not None
        looks = Looks()
        while not self._closed.wait(self.minutes * 60 / TICKS):
            act = looks.look(self._beats)
            if act == "ask":
                self._message, self._asked = self._describe(), looks.seen
                signal.pthread_kill(self._main, signal.SIGALRM)
            elif act == "end":
                self._end()

    def _raise(self, *_: object) -> None:
        if not self._closed.is_set() and self._asked == self._beats:  # it may have gone on meanwhile
            raise RunFailedError(self._message)

    def _describe(self) -> str:
        frame: FrameType | None = sys._current_frames().get(self._main)
        frames = list(walk(frame))
        return (
            f"nothing ended for {self.minutes:g} minutes while {part_of(frames).words}: the run hangs\n"
            f"it waits in {place_of(frames)}\n"
            "change: what this code waits for (a file, a device, another process); or trainer.stall_minutes, "
            "larger or null, if it only needs longer"
        )

    def _end(self) -> None:
        """The last resort. Written past Python's streams, whose locks the main thread may hold."""
        end = "it could not be interrupted, so the process ended; resume=<run folder> goes on"
        os.write(2, f"{self._message}\n{end}\n".encode(errors="replace"))
        os._exit(1)


class Looks:
    """Counts looks in a row that found no progress.

    >>> looks = Looks()
    >>> [looks.look(beats=7) for _ in range(2 * TICKS + 1)].index("ask")  # the first look sees beat 7 arrive
    10
    """

    def __init__(self) -> None:
        self.seen, self.silent = 0, 0

    def look(self, beats: int) -> str:
        """What to do now: ``wait``, ``ask`` the main thread to stop, or ``end`` the process."""
        if beats != self.seen:
            self.seen, self.silent = beats, 0
            return "wait"
        self.silent += 1
        return {TICKS: "ask", 2 * TICKS: "end"}.get(self.silent, "wait")
