"""Progress over the whole stream, with the time that is left."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

REFRESH_SECONDS = 0.2


class _Console(Console):
    """One whose reader may go away, as ``| head`` and a closed terminal do: the run goes on, silently."""

    def on_broken_pipe(self) -> None:
        """rich would end the process."""
        self.quiet = True


class StreamProgress:
    """A rich progress bar over all steps of all experiences; on a plain output, only the lines of ``say``.

    Args:
        names: of the experiences.
        steps: batches in each.
        console: where to draw; standard error by default, so that results can be piped.
        mute: say and draw nothing: another process does.
    """

    def __init__(
        self, names: Sequence[str], steps: Sequence[int], console: Console | None = None, mute: bool = False
    ) -> None:
        self.names, self.steps = list(names), list(steps)
        self.console = console or _Console(stderr=True, quiet=mute, emoji=False)
        self.bar = Progress(
            TextColumn("{task.description}", markup=False),  # a name may hold square brackets
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps, left"),
            TimeRemainingColumn(),
            console=self.console,
            # Redrawn from the training loop at a fixed pace: a thread of its own would compete for the core.
            auto_refresh=False,
            disable=not self.console.is_terminal,
        )
        self.task = self.bar.add_task("stream", total=sum(self.steps))
        self.done = 0
        self._drawn = 0.0

    def __enter__(self) -> StreamProgress:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.update(self.task, completed=self.done)
        self.bar.stop()

    def open(self, index: int, batches: int = 0) -> None:
        """Experience ``index`` begins, or goes on after some of its batches."""
        self.done = sum(self.steps[:index]) + batches
        title = f"experience {index + 1}/{len(self.names)} {self.names[index]}"
        self.bar.update(self.task, completed=self.done, description=title, refresh=True)

    def say(self, line: str) -> None:
        """One line above the bar."""
        self.bar.console.print(line, highlight=False, markup=False)

    def tick(self) -> None:
        """Count a step; redraw a few times a second."""
        self.done += 1
        now = time.monotonic()
        if now - self._drawn > REFRESH_SECONDS:
            self._drawn = now
            self.bar.update(self.task, completed=self.done, refresh=True)
