"""What MLflow keeps of a run whose folder may be gone: its artifacts, points and tags."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from cl_moe.tracking import store
from cl_moe.tracking.entries import Point, from_line
from cl_moe.tracking.outbox import OUTBOX

if TYPE_CHECKING:
    from mlflow import MlflowClient

Points = dict[tuple[str, int], float]
"""``{(metric key, step): value}``."""


@contextmanager
def fetched(run_id: str, names: Iterable[str], uri: str, key: str) -> Iterator[Path]:
    """A folder with those of the run's artifacts (files or folders at the top) that MLflow has.

    Args:
        run_id: of MLflow.
        names: of the artifacts.
        uri: of the store.
        key: that an error names.

    Raises:
        InputError: no such store or run.
        RunFailedError: the store does not answer.
    """
    client = _client_with(run_id, uri, key)
    with TemporaryDirectory(prefix="cl-moe-") as place:
        there = store.must(uri, lambda: {file.path for file in client.list_artifacts(run_id)})
        for name in there & set(names):
            store.must(uri, partial(client.download_artifacts, run_id, name, place))
        yield Path(place)


def points_in_store(run_id: str, uri: str, key: str) -> Points:
    """All points of a run that MLflow has; a run that logs a point twice has the last."""
    client = _client_with(run_id, uri, key)

    def read() -> Points:
        keys = client.get_run(run_id).data.metrics
        return {
            (name, metric.step): metric.value
            for name in keys
            for metric in client.get_metric_history(run_id, name)
        }

    return store.must(uri, read)


def points_in_folder(folder: Path) -> Points | None:
    """All points that a run noted in its folder; None if it has no tracker, or the file is damaged."""
    try:
        with open(folder / OUTBOX, "rb") as file:
            entries = [from_line(line) for line in file]
    except (OSError, ValueError):
        return None
    return {(entry.metric, entry.step): entry.value for entry in entries if isinstance(entry, Point)}


def _client_with(run_id: str, uri: str, key: str) -> MlflowClient:
    store.find_run(run_id, uri, key=key)
    return store.open_store(uri, create=False, key=key)
