"""One run's way into MLflow: points wait in a list that checkpoints carry, and are sent after one."""

from __future__ import annotations

import hashlib
import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, final

from cl_moe.errors import InputError
from cl_moe.tracking import store
from cl_moe.tracking.store import DEFAULT_URI, check_name, cut, must

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

RUN_ID_FILE = "mlflow_run_id"
Status = Literal["finished", "failed", "stopped"]
Point = tuple[str, float, int, int]  # key, value, milliseconds since 1970, step

_MLFLOW_STATUS = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}
_BATCH_PARAMS = 100
_BATCH_POINTS = 1000
# Paul Tol's "muted" scheme: told apart with any common colour blindness
_COLOURS = ["#332288", "#88ccee", "#44aa99", "#117733", "#999933", "#ddcc77", "#cc6677", "#882255", "#aa4499"]
_log = logging.getLogger(__name__)


class Tracker(ABC):
    """Where the numbers of one run go.

    The order that makes every point stand exactly once, wherever the run is killed: ``add`` points, write the
    checkpoint with ``state_dict()`` in it, then ``send``. A resumed run loads the state and sends again.
    """

    @abstractmethod
    def start(self, folder: Path, name: str, params: Mapping[str, object], tags: Mapping[str, str]) -> str:
        """Opens the run (the one whose id stands in ``folder/mlflow_run_id``, if any) and returns its id.

        Args:
            folder: the run's output folder.
            name: the name shown in MLflow.
            params: the flattened config; values are stored as text of at most 6,000 characters.
            tags: what the run is found by.

        Raises:
            InputError: the store, the experiment, a name, or the run in the folder is not what it must be.
            RunFailedError: the store does not answer.
        """

    @abstractmethod
    def add(self, points: Mapping[str, float], step: int) -> None:
        """Notes ``{metric key: value}`` at ``step``; an undefined value (NaN) is left out. Sends nothing."""

    @abstractmethod
    def send(self) -> None:
        """Sends what was noted. A store that is locked or away costs a warning and keeps the points."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """The points not yet sent, as plain Python: part of every checkpoint."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what ``state_dict`` gave; points noted before are dropped."""

    @abstractmethod
    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Stores a copy of a file with the run, in the artifact folder named.

        Raises:
            FileNotFoundError: there is no such file.
        """

    @abstractmethod
    def tag(self, key: str, value: str) -> None:
        """Sets a tag of the run."""

    @abstractmethod
    def finish(self, status: Status) -> None:
        """Sends what is left and closes the run; one that was stopped may go on later."""


@final
class NoTracker(Tracker):
    """Keeps nothing."""

    def start(self, folder: Path, name: str, params: Mapping[str, object], tags: Mapping[str, str]) -> str:
        """An empty id."""
        return ""

    def add(self, points: Mapping[str, float], step: int) -> None:
        """Nothing."""

    def send(self) -> None:
        """Nothing."""

    def state_dict(self) -> dict[str, Any]:
        """No points."""
        return {"pending": []}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing."""

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Nothing."""

    def tag(self, key: str, value: str) -> None:
        """Nothing."""

    def finish(self, status: Status) -> None:
        """Nothing."""


@final
class MLflowTracker(Tracker):
    """Writes one MLflow run.

    Args:
        uri: ``sqlite:///<file>`` (made if missing) or ``http(s)://<server>``.
        experiment: the MLflow experiment (made if missing).

    Raises:
        InputError: another kind of URI.
    """

    def __init__(self, uri: str = DEFAULT_URI, experiment: str = "cl-moe") -> None:
        self.uri, self.experiment = store.absolute_uri(uri), experiment
        self._client: MlflowClient | None = None
        self.run_id = ""
        self._pending: list[Point] = []
        self._waiting: list[Callable[[], object]] = []  # tags and artifacts, in order
        self._names: set[str] = set()
        self._clock = 0
        self._away = False
        # Of a reopened run: {key: steps that stand in the store}. A resume that had to fall back to an older
        # checkpoint comes again through steps that were sent, with new timestamps.
        self._stored: dict[str, set[int]] | None = None

    def start(self, folder: Path, name: str, params: Mapping[str, object], tags: Mapping[str, str]) -> str:
        """Creates the run, or reopens the one of the folder; see ``Tracker.start``."""
        for key in (*params, *tags):
            check_name(key, "param or tag")
        text = {key: cut(str(value)) for key, value in params.items()}
        labels = {key: cut(value) for key, value in tags.items()} | {"status": "running"}
        if "arm" in params:
            labels["mlflow.runColor"] = colour(str(params["arm"]))
        self._client = must(self.uri, lambda: store.open_store(self.uri))
        file = folder / RUN_ID_FILE
        if file.exists():
            self.run_id = file.read_text().strip()
            known = must(self.uri, self._reopen).data
            labels = {key: value for key, value in labels.items() if key == "status" or key not in known.tags}
            text = {key: value for key, value in text.items() if key not in known.params}
        else:
            self.run_id = must(self.uri, lambda: self._create(name, labels))
            store.write(file, f"{self.run_id}\n")
        rest = list(text.items())
        for begin in range(0, len(rest) or 1, _BATCH_PARAMS):
            must(self.uri, partial(self._log, dict(rest[begin : begin + _BATCH_PARAMS]), labels))
        return self.run_id

    def add(self, points: Mapping[str, float], step: int) -> None:
        """Notes points at ``step``, stamped with the time of this call."""
        # MLflow's time axis draws points of one instant as one
        self._clock = max(self._clock + 1, time.time_ns() // 1_000_000)
        for key, value in points.items():
            if key not in self._names:
                check_name(key, "metric")
                self._names.add(key)
            if not math.isnan(number := float(value)):
                self._pending.append((key, number, self._clock, step))

    def send(self) -> None:
        """Sends points, tags and artifacts that wait, oldest first, as far as the store takes them."""
        while self._pending:
            batch = self._pending[:_BATCH_POINTS]
            if not self._try(partial(self._send, batch)):
                return
            del self._pending[: len(batch)]
        self._waiting = [action for action in self._waiting if not self._try(action)]

    def state_dict(self) -> dict[str, Any]:
        """``{"pending": [(key, value, milliseconds, step), ...]}``."""
        return {"pending": list(self._pending)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes the points of a checkpoint, with the timestamps they had."""
        self._pending = [
            (str(key), float(value), int(ms), int(step)) for key, value, ms, step in state["pending"]
        ]
        self._clock = max([self._clock, *(point[2] for point in self._pending)])

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Copies the file now, or with a later ``send`` if the store is away."""
        if not path.is_file():
            raise FileNotFoundError(path)
        self._soon(lambda: self.client.log_artifact(self.run_id, str(path), folder))

    def tag(self, key: str, value: str) -> None:
        """Sets the tag now, or with a later ``send`` if the store is away."""
        check_name(key, "tag")
        self._soon(lambda: self.client.set_tag(self.run_id, key, cut(value)))

    def finish(self, status: Status) -> None:
        """Closes the run; what the store does not take then is named in a warning."""
        self._waiting.append(lambda: self.client.set_tag(self.run_id, "status", status))
        self._waiting.append(lambda: self.client.set_terminated(self.run_id, _MLFLOW_STATUS[status]))
        self.send()
        if self._pending or self._waiting:
            _log.warning(
                "MLflow run %s was not closed: %d points and %d tags or files did not reach %s. "
                "The points are in the last checkpoint, the files in the run's folder; resume to send them.",
                *(self.run_id, len(self._pending), len(self._waiting), self.uri),
            )

    @property
    def client(self) -> MlflowClient:
        """The open client; ``start`` comes first."""
        if self._client is None:
            raise RuntimeError("the tracker was not started")
        return self._client

    def _create(self, name: str, tags: dict[str, str]) -> str:
        experiment = store.experiment_id(self.client, self.experiment)
        return str(self.client.create_run(experiment, run_name=name, tags=tags).info.run_id)

    def _reopen(self) -> Run:
        run = store.lookup(self.client, self.run_id)
        if run is None:
            raise InputError(
                got=f"the run {self.run_id!r} of this folder's {RUN_ID_FILE}, which {self.uri} does not have",
                allowed=f"the store in which the run began; without {RUN_ID_FILE} a new MLflow run begins",
                key="tracking.uri",
            )
        self.client.update_run(self.run_id, status="RUNNING")
        self._stored = {}
        return run

    def _log(self, params: Mapping[str, str], tags: Mapping[str, str]) -> None:
        from mlflow.entities import Param, RunTag

        self.client.log_batch(
            self.run_id,
            params=[Param(key, value) for key, value in params.items()],
            tags=[RunTag(key, value) for key, value in tags.items()],
        )

    def _send(self, batch: Sequence[Point]) -> None:
        from mlflow.entities import Metric

        points = [Metric(*point) for point in batch if not self._stands(point)]
        if points:
            self.client.log_batch(self.run_id, metrics=points)

    def _stands(self, point: Point) -> bool:
        if self._stored is None:
            return False
        key = point[0]
        if key not in self._stored:
            self._stored[key] = {metric.step for metric in self.client.get_metric_history(self.run_id, key)}
        return point[3] in self._stored[key]

    def _soon(self, action: Callable[[], object]) -> None:
        if self._waiting or not self._try(action):  # never before an older one: it may be the same tag
            self._waiting.append(action)

    def _try(self, action: Callable[[], object]) -> bool:
        """Whether it worked; an outage is one warning, and its later failures are not waited for."""
        try:
            store.retry(action, () if self._away else store.PAUSES)
        except store.store_errors() as error:
            if not self._away:
                _log.warning(
                    "The MLflow store %s does not take numbers now (%s). The run goes on and keeps them.",
                    *(self.uri, store.first_line(error)),
                )
            self._away = True
            return False
        self._away = False
        return True


def colour(arm: str) -> str:
    """The colour of an arm in MLflow's charts: the same in every run and on every machine.

    >>> colour("naive") == colour("naive")
    True
    """
    return _COLOURS[int.from_bytes(hashlib.sha256(arm.encode()).digest()[:4]) % len(_COLOURS)]
