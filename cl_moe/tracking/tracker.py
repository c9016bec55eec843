"""One run's way into MLflow: what it tells goes into its outbox, and from there as the store takes it."""

from __future__ import annotations

import logging
import math
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from cl_moe import stopping
from cl_moe.errors import InputError
from cl_moe.files import write_atomically
from cl_moe.tracking import store, sweeps
from cl_moe.tracking.colours import COLOUR
from cl_moe.tracking.courier import (
    SLOW,
    Backoff,
    Courier,
    described,
    hurried,
    known_run,
    left,
    log_params,
)
from cl_moe.tracking.entries import START_TAG, Closing, Entry, File, Point, Tag, batches, tag_name
from cl_moe.tracking.interface import NoTracker as NoTracker
from cl_moe.tracking.interface import Status, Tracker
from cl_moe.tracking.outbox import RUN_ID_FILE, START_FILE, Outbox, read_run_id, read_start
from cl_moe.tracking.store import DEFAULT_URI, check_name, cut, must
from cl_moe.tracking.system import SystemMetrics

if TYPE_CHECKING:
    from mlflow import MlflowClient

_RENEWED = ("status", "output_dir")  # tags that a resume sets anew: the folder may have been moved
_log = logging.getLogger(__name__)


@final
class MLflowTracker(Tracker):
    """Writes one MLflow run.

    Args:
        uri: ``sqlite:///<file>`` (made if missing) or ``http(s)://<server>``.
        experiment: the MLflow experiment (made if missing).
        system_metrics: have MLflow watch the machine, too.

    Raises:
        InputError: another kind of URI, or psutil is missing where the machine shall be watched.
    """

    def __init__(
        self, uri: str = DEFAULT_URI, experiment: str = "cl-moe", system_metrics: bool = False
    ) -> None:
        self.uri, self.experiment = store.absolute_uri(uri), experiment
        self._system = SystemMetrics() if system_metrics else None
        self.run_id = ""
        self.backoff = Backoff()
        self._outbox: Outbox | None = None
        self._courier: Courier | None = None
        self._reopening: Callable[[], None] | None = None  # waits for a store that was away at the start
        self._noted: list[Entry] = []  # points of no checkpoint yet
        self._unwritten: list[Entry] = []  # tags and files that a full disk did not take
        self._clock = 0

    def start(
        self,
        folder: Path,
        name: str,
        params: Mapping[str, object],
        tags: Mapping[str, str],
        sweep: Path | None = None,
    ) -> str:
        """Creates the run, or reopens the one of the folder; see ``Tracker.start``."""
        text, labels = described(params, tags)
        store.load_mlflow()
        start = folder / START_FILE
        if (folder / RUN_ID_FILE).exists():
            start.unlink(missing_ok=True)
            self.run_id = read_run_id(folder)
            self._outbox = Outbox(folder, self.run_id)
            self._reopening = partial(self._reopen, text, labels)
            self._attempt(partial(self._open, store.PAUSES), refuse=True)
            return self.run_id
        Outbox(folder, "")  # refuses a link, before anything is made
        client = must(self.uri, lambda: store.open_store(self.uri))
        if not start.exists():  # else a process was killed here, perhaps when MLflow had its run already
            write_atomically(start, f"{secrets.token_hex(16)}\n".encode())
        labels[START_TAG] = read_start(folder)
        arm = str(params.get("arm", ""))
        self.run_id = must(self.uri, lambda: self._create(client, name, labels, sweep, arm))
        self._outbox = Outbox(folder, self.run_id)
        write_atomically(folder / RUN_ID_FILE, f"{self.run_id}\n".encode())
        start.unlink()
        labels.pop(COLOUR, None)  # it has the one that no other arm has
        must(self.uri, lambda: log_params(client, self.run_id, text, labels))
        self._goes_to(client, known=False)
        return self.run_id

    def add(self, points: Mapping[str, float], step: int) -> None:
        """Notes points at ``step``, stamped with the time of this call."""
        if not points:
            return
        stamp = self._stamp()
        for key, value in points.items():
            check_name(key, "metric")
            if not math.isnan(number := float(value)):
                self._noted.append(Point(key, number, stamp, int(step)))

    def send(self) -> None:
        """Sends what the outbox holds, oldest first, as far as that holds up neither training nor a stop."""
        if self.backoff.due():
            self._attempt(self._deliver_in_a_hurry if stopping.asked() else self._deliver)

    def state_dict(self) -> dict[str, Any]:
        """``bytes`` of the outbox up to this moment, and the clock: always of one size."""
        self.outbox.append([*self._unwritten, *self._noted], durable=True)
        self._unwritten, self._noted = [], []
        return {"bytes": self.outbox.length, "clock": self._clock}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Cuts the outbox to where it was at the checkpoint; without one, to nothing."""
        self._unwritten, self._noted = [], []
        length = 0 if state is None else int(state["bytes"])
        kept = self.outbox.cut(length)
        if kept < length:
            _log.warning(
                "%s ends at byte %d, before the checkpoint's %d: points that MLflow does not have are lost.",
                *(self.outbox.file, kept, length),
            )
        self._clock = max(self._clock, 0 if state is None else int(state["clock"]))

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Copies the file now, or as it is then with a later ``send`` if the store is away."""
        if not path.is_file():
            raise FileNotFoundError(path)
        home = self.outbox.folder.absolute()
        inside = path.absolute().is_relative_to(home)
        file = File(str(path.absolute().relative_to(home) if inside else path.absolute()), folder or "")
        self.outbox.path(file)  # refuses what lies elsewhere
        self._put(file)

    def tag(self, key: str, value: str) -> None:
        """Sets the tag now, or with a later ``send`` if the store is away."""
        check_name(key, "tag")
        tag_name(key)
        text = value.replace("\0", "").encode(errors="replace").decode()  # of an error about odd bytes, say
        self._put(Tag(key, cut(text)))

    def finish(self, status: Status) -> None:
        """Closes the run; what the store does not take stays in the outbox and is named in a warning."""
        if self._system is not None:
            self._system.stop()
        entries = [*self._unwritten, *self._noted, Closing(status, self._stamp())]
        try:
            self.outbox.append(entries, durable=True)
            entries = []
        except (OSError, InputError) as error:
            _log.warning("%s does not take the end of the run: %s", self.outbox.file, store.first_line(error))
        self._unwritten, self._noted = [], []
        if status == "stopped":  # whoever asked for it kills before long
            deliver = partial(self._deliver_in_a_hurry, entries)
        else:
            deliver = partial(self._deliver, entries, in_earnest=True)
        trouble = self._attempt(deliver, warn=False)
        if trouble is not None:
            _log.warning(
                "MLflow run %s was not closed: %s", self.run_id, left(self.outbox, self.uri, trouble)
            )

    def _stamp(self) -> int:
        # MLflow's time axis draws points of one instant as one
        self._clock = max(self._clock + 1, time.time_ns() // 1_000_000)
        return self._clock

    @property
    def client(self) -> MlflowClient:
        """The open client; ``start`` comes first."""
        if self._courier is None:
            raise RuntimeError("the tracker was not started, or its store has not answered yet")
        return self._courier.client

    @property
    def outbox(self) -> Outbox:
        """The outbox of the run's folder; ``start`` comes first."""
        if self._outbox is None:
            raise RuntimeError("the tracker was not started")
        return self._outbox

    def _create(
        self, client: MlflowClient, name: str, tags: dict[str, str], sweep: Path | None, arm: str
    ) -> str:
        """The run that a try before this one made, if it came so far; else a new one."""
        experiment = store.experiment_id(client, self.experiment)
        made = client.search_runs([experiment], f"tags.{START_TAG} = '{tags[START_TAG]}'", max_results=1)
        if made:
            return str(made[0].info.run_id)
        sweeps.offer_views(client, experiment)
        with sweeps.place(client, experiment, sweep, tags, arm) as labels:
            return str(client.create_run(experiment, run_name=name, tags=labels).info.run_id)

    def _reopen(self, params: Mapping[str, str], tags: Mapping[str, str]) -> None:
        """Marks the run as running, and sets what it lacks; each may be done twice."""
        client, run = known_run(self.uri, self.run_id, key="tracking.uri")
        client.update_run(self.run_id, status="RUNNING")
        labels = {key: value for key, value in tags.items() if key in _RENEWED or key not in run.data.tags}
        rest = {key: value for key, value in params.items() if key not in run.data.params}
        log_params(client, self.run_id, rest, labels)
        sweeps.settle(client, self.run_id)
        self._goes_to(client, known=True)

    def _goes_to(self, client: MlflowClient, *, known: bool) -> None:
        self._courier = Courier(self.uri, client, self.outbox, known=known)
        if self._system is not None:
            self._system.start(self.uri, self.run_id)

    def _put(self, entry: Entry) -> None:
        try:
            self.outbox.append([*self._unwritten, entry])
            self._unwritten = []
        except (OSError, InputError):  # it goes with the next checkpoint, which fails aloud, or with the end
            self._unwritten.append(entry)
        self.send()

    def _attempt(
        self, action: Callable[[], None], *, warn: bool = True, refuse: bool = False
    ) -> Exception | None:
        """What went wrong, if anything did; the first failure of an outage is a warning."""
        began = self.backoff.clock()
        try:
            action()
        except Exception as error:  # whatever ails a store, training goes on
            if refuse and isinstance(error, InputError):
                raise
            if warn and not self.backoff.failures:
                _log.warning(
                    "The MLflow store %s takes no numbers now (%s). The run goes on and keeps them in %s.",
                    *(self.uri, store.first_line(error), self.outbox.file),
                )
            self.backoff.failed(self.backoff.clock() - began)
            return error
        self.backoff.worked(self.backoff.clock() - began)
        return None

    def _deliver(self, last: Sequence[Entry] = (), *, in_earnest: bool = False) -> None:
        """Delivers the outbox, then ``last``; not in earnest, a store that was away is tried once only."""
        began = self.backoff.clock()
        pauses = () if self.backoff.failures and not in_earnest else store.PAUSES
        self._open(pauses)
        for batch in self.outbox.waiting():
            store.retry(partial(self._send, batch.entries), pauses)
            self.outbox.note_sent(batch.end)
            if not in_earnest and self.backoff.clock() - began > SLOW:
                return
        for batch in batches((entry, 0) for entry in last):
            store.retry(partial(self._send, batch.entries), pauses)

    def _deliver_in_a_hurry(self, last: Sequence[Entry] = ()) -> None:
        """One try, which ends after the batch that is under way when a few seconds are over."""
        if self._reopening is not None:
            raise TimeoutError("it has not answered since the run went on")
        began = self.backoff.clock()
        with hurried():
            for batch in self.outbox.waiting():
                if self.backoff.clock() - began > SLOW:
                    raise TimeoutError("it is slow, and the run was asked to stop")
                self._send(batch.entries)
                self.outbox.note_sent(batch.end)
            for batch in batches((entry, 0) for entry in last):
                self._send(batch.entries)

    def _open(self, pauses: Sequence[float]) -> None:
        if self._reopening is not None:
            store.retry(self._reopening, pauses)
            self._reopening = None

    def _send(self, entries: Sequence[Entry]) -> None:
        assert self._courier is not None
        self._courier.deliver(entries)
