"""What a run asks of whatever keeps its numbers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, final

Status = Literal["finished", "failed", "stopped"]


class Tracker(ABC):
    """Where the numbers of one run go.

    The order that makes every point stand exactly once, wherever the run is killed: ``start``, then
    ``load_state_dict`` of the checkpoint that the run goes on from (None without one); ``add`` points, write
    a checkpoint with ``state_dict()`` in it, then ``send``.
    """

    @abstractmethod
    def start(
        self,
        folder: Path,
        name: str,
        params: Mapping[str, object],
        tags: Mapping[str, str],
        sweep: Path | None = None,
    ) -> str:
        """Opens the run (the one whose id stands in ``folder/mlflow_run_id``, if any) and returns its id.

        A new run needs a store that answers. For a run that goes on, one that does not is a warning.

        Args:
            folder: the run's output folder.
            name: the name shown in MLflow.
            params: the flattened config; values are stored as text of at most 6,000 characters.
            tags: what the run is found by.
            sweep: folder of the sweep that it is a job of.

        Raises:
            InputError: the store, the experiment, a name, or the run in the folder is not what it must be.
            RunFailedError: the store does not answer, and the run is new.
        """

    @abstractmethod
    def add(self, points: Mapping[str, float], step: int) -> None:
        """Notes ``{metric key: value}`` at ``step``; an undefined value (NaN) is left out. Sends nothing."""

    @abstractmethod
    def send(self) -> None:
        """Sends what ``state_dict`` put away. A store that is locked or away costs a warning, not time."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Puts the points noted so far on the disk; returns where they end: part of every checkpoint.

        Raises:
            OSError: the disk is full, say; the points are kept for the next call.
        """

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Goes back to where ``state_dict`` was called; None: to the start. What came after is forgotten."""

    @abstractmethod
    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Stores a copy of a file of the run's folder with the run, in the artifact folder named.

        Raises:
            FileNotFoundError: there is no such file.
            InputError: it lies elsewhere.
        """

    @abstractmethod
    def tag(self, key: str, value: str) -> None:
        """Sets a tag of the run.

        Raises:
            InputError: a name that MLflow does not take, or one that it, or the run's start and end, use.
        """

    @abstractmethod
    def finish(self, status: Status) -> None:
        """Sends what is left, points of no checkpoint too, and closes the run; a stopped one may go on."""


@final
class NoTracker(Tracker):
    """Keeps nothing."""

    def start(
        self,
        folder: Path,
        name: str,
        params: Mapping[str, object],
        tags: Mapping[str, str],
        sweep: Path | None = None,
    ) -> str:
        """An empty id."""
        return ""

    def add(self, points: Mapping[str, float], step: int) -> None:
        """Nothing."""

    def send(self) -> None:
        """Nothing."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing to go back to."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Nothing."""

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Nothing."""

    def tag(self, key: str, value: str) -> None:
        """Nothing."""

    def finish(self, status: Status) -> None:
        """Nothing."""
