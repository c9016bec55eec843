"""Whatever is killed, away, answered late or gone back on: in the end every point stands once.

The store is a stand-in with MLflow's one rule: a point sent again is ignored only if all of it is the same.
"""

from __future__ import annotations

import itertools
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from cl_moe.tracking import store
from cl_moe.tracking.outbox import OUTBOX, SENT
from cl_moe.tracking.sync import Syncer
from cl_moe.tracking.tracker import MLflowTracker

URI = "http://127.0.0.1:9"
RUN = "0" * 32
KEYS = ("train/loss", "stream/forgetting")


def value(key: str, step: int) -> float:
    return step / 7 + KEYS.index(key)


class StandIn:
    """A store of one run that goes away, and comes back, as it is told."""

    tracking_uri = URI

    def __init__(self) -> None:
        self.metrics: set[tuple[str, float, int, int]] = set()
        self.tags: dict[str, str] = {}
        self.params: dict[str, str] = {}
        self.files: set[str] = set()
        self.status = "RUNNING"
        self.away = self.forgets_to_answer = False

    def _answer(self) -> None:
        if self.away or self.forgets_to_answer:
            raise MlflowException("no answer")

    def log_batch(self, run_id: str, metrics: Any = (), params: Any = (), tags: Any = ()) -> None:
        if not self.away:
            self.metrics |= {(m.key, m.value, m.timestamp, m.step) for m in metrics}
            self.params |= {p.key: p.value for p in params}
            self.tags |= {t.key: t.value for t in tags}
        self._answer()

    def set_tag(self, run_id: str, key: str, text: str) -> None:
        if not self.away:
            self.tags[key] = text
        self._answer()

    def set_terminated(self, run_id: str, status: str, end_time: int) -> None:
        if not self.away:
            self.status = status
        self._answer()

    def update_run(self, run_id: str, status: str) -> None:
        self._answer()
        self.status = status

    def log_artifact(self, run_id: str, path: str, folder: str | None) -> None:
        if not self.away:
            self.files.add(Path(path).name)
        self._answer()

    def get_metric_history(self, run_id: str, key: str) -> list[SimpleNamespace]:
        self._answer()
        return [SimpleNamespace(step=step) for name, _, _, step in self.metrics if name == key]

    def get_run(self, run_id: str) -> SimpleNamespace:
        self._answer()
        data = SimpleNamespace(tags=dict(self.tags), params=dict(self.params))
        return SimpleNamespace(info=SimpleNamespace(lifecycle_stage="active", run_id=RUN), data=data)

    def create_run(self, *_: object, tags: dict[str, str] | None = None, **__: object) -> SimpleNamespace:
        self.tags |= tags or {}
        return self.get_run(RUN)

    def search_runs(self, *_: object, **__: object) -> list[SimpleNamespace]:
        self._answer()
        return []

    def get_experiment(self, _: str) -> SimpleNamespace:
        return SimpleNamespace(tags={})

    def set_experiment_tag(self, *_: str) -> None:
        self._answer()

    def get_experiment_by_name(self, _: str) -> SimpleNamespace:
        return SimpleNamespace(lifecycle_stage="active", experiment_id="1")


class Lives(RuleBasedStateMachine):
    """A run whose process, store and checkpoints have accidents."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.mlflow = StandIn()
        self.patch.setattr(store, "open_store", lambda *_, **__: self.mlflow)
        self.patch.setattr(store, "PAUSES", ())
        self.folder = Path(tempfile.mkdtemp())
        self.time = itertools.count(0, 100_000)  # any pause is over at the next call
        self.step = self.furthest = 0
        self.saved: list[tuple[dict[str, Any] | None, int]] = [(None, 0)]
        self.tracker = MLflowTracker(URI)
        self.begin(None)

    def begin(self, state: dict[str, Any] | None) -> None:
        self.tracker = MLflowTracker(URI)
        self.tracker.backoff.clock = lambda: float(next(self.time))
        self.tracker.start(self.folder, "a run", {"arm": "x", "depth": 3}, {"stream": "digits"})
        self.tracker.load_state_dict(state)

    @rule(steps=st.integers(1, 4))
    def add(self, steps: int) -> None:
        for _ in range(steps):
            self.tracker.add({key: value(key, self.step) for key in KEYS}, self.step)
            self.step += 1
        self.furthest = max(self.furthest, self.step)

    @rule(also_send=st.booleans())
    def checkpoint(self, also_send: bool) -> None:
        self.saved.append((self.tracker.state_dict(), self.step))
        if also_send:
            self.tracker.send()

    @rule()
    def tag_and_file(self) -> None:
        (self.folder / "table.csv").write_text("a,b")
        self.tracker.tag("note", str(self.step))
        self.tracker.artifact(self.folder / "table.csv")

    @rule(away=st.booleans(), forgets=st.booleans())
    def trouble(self, away: bool, forgets: bool) -> None:
        self.mlflow.away, self.mlflow.forgets_to_answer = away, forgets

    @rule(back=st.integers(1, 3), torn=st.sampled_from([b"", b'{"metric": "tr']), unnoted=st.booleans())
    def kill_and_resume(self, back: int, torn: bytes, unnoted: bool) -> None:
        """From the newest checkpoint, or one before it; perhaps what was sent last had not been noted yet."""
        if torn and (self.folder / OUTBOX).exists():
            with (self.folder / OUTBOX).open("ab") as file:
                file.write(torn)
        if unnoted:
            (self.folder / SENT).unlink(missing_ok=True)
        self._go_back(back)

    @rule(status=st.sampled_from(["finished", "failed", "stopped"]), back=st.integers(1, 2))
    def finish_and_resume(self, status: str, back: int) -> None:
        self.tracker.finish(status)  # type: ignore[arg-type]
        self._go_back(back)

    @precondition(lambda self: (self.folder / OUTBOX).exists())
    @rule(back=st.integers(1, 2), mended=st.booleans())
    def kill_and_sync_and_resume(self, back: int, mended: bool) -> None:
        if mended:
            self.trouble(False, False)
        Syncer(URI).sync(self.folder)
        self._go_back(back)

    def _go_back(self, back: int) -> None:
        del self.saved[max(1, len(self.saved) - back + 1) :]
        state, self.step = self.saved[-1]
        self.begin(state)

    def teardown(self) -> None:
        self.trouble(False, False)
        self.add(self.furthest - self.step + 1)  # an older checkpoint is behind what was seen once
        self.tag_and_file()
        self.tracker.finish("finished")
        found = sorted((key, step, number) for key, number, _, step in self.mlflow.metrics)
        assert found == sorted((key, step, value(key, step)) for key in KEYS for step in range(self.furthest))
        stamps = [ms for key, _, ms, _ in self.mlflow.metrics if key == KEYS[0]]
        assert len(set(stamps)) == len(stamps)
        assert (self.mlflow.status, self.mlflow.tags["status"]) == ("FINISHED", "finished")
        assert self.mlflow.tags["note"] == str(self.step)
        assert self.mlflow.params == {"arm": "x", "depth": "3"}
        assert self.mlflow.files == {"table.csv"}
        self.patch.undo()
        shutil.rmtree(self.folder)


TestLives = Lives.TestCase
TestLives.settings = settings(max_examples=60, stateful_step_count=25, deadline=None, derandomize=True)


def test_the_stand_in_keeps_points_as_mlflow_does(uri: str) -> None:
    from mlflow.entities import Metric

    client, stand_in = store.open_store(uri), StandIn()
    run_id = client.create_run(store.experiment_id(client, "x")).info.run_id
    same, later = Metric("a", 1.0, 1000, 1), Metric("a", 1.0, 1001, 1)
    for one in (client, stand_in):
        for batch in ([same], [same, later], [later]):
            one.log_batch(run_id, metrics=batch)
    history: list[Any] = MlflowClient(uri).get_metric_history(run_id, "a")
    assert {(m.key, m.value, m.timestamp, m.step) for m in history} == stand_in.metrics
    assert len(history) == len(stand_in.metrics) == 2
