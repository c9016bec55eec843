"""From an outbox into one MLflow run, and when to try again a store that did not take it."""

from __future__ import annotations

import logging
import os
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, final

from cl_moe.errors import InputError
from cl_moe.tracking import store, sweeps
from cl_moe.tracking.colours import COLOUR, colour
from cl_moe.tracking.entries import Closing, Entry, File, Point, Tag
from cl_moe.tracking.outbox import OUTBOX, RUN_ID_FILE, Outbox
from cl_moe.tracking.store import check_name, cut

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

SLOW = 5.0  # seconds of delivering at one go, after which training has the word again
_MLFLOW_STATUS = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}
_BATCH_PARAMS = 100
_FIRST_PAUSE, _LONGEST_PAUSE = 10.0, 600.0  # seconds
_SHARE = 20.0  # a store that is slow, or slow to fail, gets a twentieth of the time
_LOCK_PATIENCE = 20.0  # seconds; as long as sqlite itself waits for a lock
_HURRIED = 2  # seconds that a store has to answer a process that was asked to stop
_log = logging.getLogger(__name__)


@final
class Courier:
    """Delivers entries into one MLflow run.

    Args:
        uri: of the store.
        client: of the store.
        outbox: of the run.
        known: points may stand in the run that the outbox does not note as delivered, under other timestamps:
            a resume that had to fall back to an older checkpoint comes again through steps that were sent.
    """

    def __init__(self, uri: str, client: MlflowClient, outbox: Outbox, *, known: bool) -> None:
        self.client, self._outbox = client, outbox
        self._database = store.database(uri)
        self._identity = _identity(self._database)
        self._stored: dict[str, set[int]] | None = {} if known else None  # steps that stand, by key

    def deliver(self, entries: Sequence[Entry]) -> bool:
        """Sends one batch; to send it again is harmless. False if it was a file that is gone.

        Raises:
            InputError: an entry is none that a run would write.
            Exception: whatever the store raises, see ``store.store_errors``.
        """
        if _identity(self._database) != self._identity:  # an open database would swallow it, and be no more
            raise FileNotFoundError(f"{self._database} was moved, removed or replaced")
        first, run_id = entries[0], self._outbox.run_id
        if isinstance(first, Tag):
            check_name(first.tag, "tag")
            self.client.set_tag(run_id, first.tag, cut(first.value))
        elif isinstance(first, File):
            return self._copy(first)
        elif isinstance(first, Closing):
            self.client.set_tag(run_id, "status", first.status)
            self.client.set_terminated(run_id, _MLFLOW_STATUS[first.status], end_time=first.ms)
            sweeps.settle(self.client, run_id)
        else:
            self._points([point for point in entries if isinstance(point, Point)])
        return True

    def _points(self, points: Sequence[Point]) -> None:
        from mlflow.entities import Metric

        new: dict[tuple[str, int], Point] = {}
        for point in points:
            check_name(point.metric, "metric")
            if point.step not in self._steps(point.metric):
                new.setdefault((point.metric, point.step), point)
        if new:
            self.client.log_batch(self._outbox.run_id, metrics=[Metric(*point) for point in new.values()])
        if self._stored is not None:
            for key, step in new:
                self._stored[key].add(step)

    def _steps(self, key: str) -> set[int]:
        """Steps of a metric that need not be sent."""
        if self._stored is None:
            return set()
        if key not in self._stored:
            history = self.client.get_metric_history(self._outbox.run_id, key)
            self._stored[key] = {metric.step for metric in history}
        return self._stored[key]

    def _copy(self, file: File) -> bool:
        path = self._outbox.path(file)
        if path is None:
            _log.warning("%s is gone from %s and does not reach MLflow.", file.artifact, self._outbox.folder)
            return False
        self.client.log_artifact(self._outbox.run_id, str(path), file.folder or None)
        return True


@final
class Backoff:
    """When to try a store again: 10 s after it failed, 20 s, 40 s, ... 10 min; later if a try takes long.

    Args:
        clock: seconds since any moment.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.failures = 0  # of this outage
        self._next = float("-inf")

    def due(self) -> bool:
        """Whether it is time."""
        return self.clock() >= self._next

    def failed(self, seconds: float) -> None:
        """A try of so many seconds failed."""
        pause = min(_FIRST_PAUSE * 2.0 ** min(self.failures, 10), _LONGEST_PAUSE)
        self.failures += 1
        self._next = self.clock() + max(pause, _SHARE * seconds)

    def worked(self, seconds: float) -> None:
        """The store took what it was given, in so many seconds."""
        self.failures = 0
        self._next = self.clock() + (_SHARE * seconds if seconds > SLOW else 0.0)


@contextmanager
def hurried() -> Iterator[None]:
    """Has MLflow wait two seconds for a locked or silent store, not twenty: schedulers kill after thirty."""
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    def shorten(_1: object, _2: object, statement: str, given: object, *_3: object) -> tuple[str, object]:
        # MLflow sets it with every session, and has no option for it
        setting = statement.startswith("PRAGMA busy_timeout")
        return (f"PRAGMA busy_timeout = {_HURRIED * 1000}" if setting else statement), given

    short = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": str(_HURRIED)}
    before = {name: os.environ.get(name) for name in short}
    os.environ.update(short)
    event.listen(Engine, "before_cursor_execute", shorten, retval=True)
    try:
        yield
    finally:
        event.remove(Engine, "before_cursor_execute", shorten)
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def known_run(uri: str, run_id: str, *, key: str) -> tuple[MlflowClient, Run]:
    """A client of a store that exists, and a run in it.

    Raises:
        InputError: the store answers, or is a file that is not there, and does not have the run.
        Exception: whatever a store raises that does not answer, see ``store.store_errors``.
    """
    allowed = (
        f"the store in which the run began; or remove {RUN_ID_FILE} from its folder: resume=<folder> then "
        f"begins a new MLflow run and sends it all that {OUTBOX} holds"
    )
    database = store.database(uri)
    if database is not None and not database.is_file():
        raise InputError(got=f"{uri}: no such file", allowed=allowed, key=key)
    client = store.open_store(uri, create=False, key=key, patience=_LOCK_PATIENCE)
    run = store.lookup(client, run_id)
    if run is None:
        raise InputError(got=f"the run {run_id!r}, which {uri} does not have", allowed=allowed, key=key)
    return client, run


def log_params(client: MlflowClient, run_id: str, params: Mapping[str, str], tags: Mapping[str, str]) -> None:
    """Sets params, and tags with the first of them, in batches that MLflow takes."""
    from mlflow.entities import Param, RunTag

    rest = [Param(key, value) for key, value in params.items()]
    labels = [RunTag(key, value) for key, value in tags.items()]
    for begin in range(0, len(rest) or 1, _BATCH_PARAMS):
        batch = rest[begin : begin + _BATCH_PARAMS]
        store.retry(
            partial(client.log_batch, run_id, params=batch, tags=labels if begin == 0 else ()), store.PAUSES
        )


def described(params: Mapping[str, object], tags: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Params and tags as MLflow gets them when a run starts: text that it takes, a status, a colour.

    Raises:
        InputError: a name that MLflow does not take.
    """
    for key in (*params, *tags):
        check_name(key, "param or tag")
    labels = {key: cut(value) for key, value in tags.items()} | {"status": "running"}
    if "arm" in params:
        labels[COLOUR] = colour(str(params["arm"]))
    return {key: cut(str(value)) for key, value in params.items()}, labels


def left(outbox: Outbox, uri: str, trouble: Exception) -> str:
    """What did not get to the store, why, and how it gets there."""
    folder = shlex.quote(str(outbox.folder))
    try:
        waiting = str(outbox.check())
    except (InputError, OSError) as error:
        return (
            f"{store.first_line(trouble)}. {outbox.file} is not what the run wrote "
            f"({store.first_line(error)}), so what it holds is not delivered before that is mended."
        )
    return (
        f"{waiting} did not reach {uri} ({store.first_line(trouble)}). They are kept in {outbox.file}: "
        f"`cl-moe-compare --sync {folder}` delivers them, and so does a resume."
    )


def _identity(file: Path | None) -> tuple[int, int] | None:
    """Which file it is, whatever its name; None for a server, or if it is not there."""
    try:
        status = file.stat() if file is not None else None
    except FileNotFoundError:
        return None
    return (status.st_dev, status.st_ino) if status is not None else None
