"""A tracker whose store, or disk, does not take what it has to tell."""

import itertools
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from sqlalchemy import event
from sqlalchemy.engine import Engine

from cl_moe import stopping
from cl_moe.errors import InputError, RunFailedError
from cl_moe.tracking import store
from cl_moe.tracking.outbox import OUTBOX, RUN_ID_FILE, undelivered
from cl_moe.tracking.tracker import MLflowTracker


def _begin(uri: str, folder: Path, **params: object) -> MLflowTracker:
    tracker = MLflowTracker(uri)
    tracker.start(folder, "a run", {"arm": "naive", **params}, {"stream": "digits"})
    return tracker


def _history(tracker: MLflowTracker, key: str) -> list[tuple[int, float]]:
    return sorted((m.step, m.value) for m in tracker.client.get_metric_history(tracker.run_id, key))


def _break(client: MlflowClient, monkeypatch: pytest.MonkeyPatch) -> Callable[[], object]:
    def away(*args: object, **kwargs: object) -> None:
        raise MlflowException("database is locked")

    real = {
        name: getattr(client, name) for name in ("log_batch", "log_artifact", "set_tag", "set_terminated")
    }
    for name in real:
        monkeypatch.setattr(client, name, away)
    return lambda: [monkeypatch.setattr(client, name, method) for name, method in real.items()]


def test_training_goes_on_without_the_store(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = _begin(uri, tmp_path)
    (tmp_path / "table.csv").write_text("a,b")
    monkeypatch.setattr(store, "PAUSES", (0.0, 0.0))
    mend, states = _break(tracker.client, monkeypatch), list[dict[str, object]]()
    with caplog.at_level(logging.WARNING):
        for step in range(3):
            tracker.add({"train/loss": float(step)}, step)
            states.append(tracker.state_dict())
            tracker.send()
        tracker.tag("note", "old")
        tracker.tag("note", "new")
        tracker.artifact(tmp_path / "table.csv")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    sizes = {len(str(state)) - len(str(state["bytes"])) for state in states}
    assert len(sizes) == 1  # a checkpoint does not grow while a store is away
    assert undelivered(tmp_path)
    mend()
    tracker.finish("finished")
    assert _history(tracker, "train/loss") == [(0, 0.0), (1, 1.0), (2, 2.0)]
    assert tracker.client.get_run(tracker.run_id).data.tags["note"] == "new"
    assert not undelivered(tmp_path)
    assert tracker.client.list_artifacts(tracker.run_id)[0].path == "table.csv"


def test_finish_says_what_did_not_arrive(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = _begin(uri, tmp_path)
    monkeypatch.setattr(store, "PAUSES", ())
    _break(tracker.client, monkeypatch)
    tracker.add({"train/loss": 1.0}, 0)
    with caplog.at_level(logging.WARNING):
        tracker.finish("finished")
    (warning,) = [record.message for record in caplog.records]
    assert "1 point, the end of the run did not reach" in warning
    assert "database is locked" in warning
    assert f"cl-moe-compare --sync {tmp_path}" in warning


def test_a_slow_store_waits_for_its_turn(uri: str, tmp_path: Path) -> None:
    tracker, now = (
        _begin(uri, tmp_path),
        itertools.count(0, 6),
    )  # every look at the clock is six seconds later
    for step in range(2500):
        tracker.add({"train/loss": float(step)}, step)
    tracker.state_dict()
    tracker.backoff.clock = lambda: float(next(now))
    for _ in range(4):
        tracker.send()
    assert len(_history(tracker, "train/loss")) == 1000  # one batch, and then training has the word
    tracker.finish("finished")
    assert len(_history(tracker, "train/loss")) == 2500


def test_a_store_that_does_not_answer_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(store, "PAUSES", (0.0,))
    with pytest.raises(RunFailedError, match="tracking=none"):
        _begin("http://127.0.0.1:9", tmp_path)


def test_a_full_disk_does_not_keep_the_end_from_a_store_that_answers(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    tracker = _begin(uri, tmp_path)
    tracker.add({"train/loss": 1.0}, 0)
    tracker.state_dict()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        tracker.add({"train/loss": 0.5}, 1)
        with pytest.raises(OSError, match="space"):
            tracker.state_dict()
        patch.setattr(tracker.outbox, "append", full)
        tracker.tag("failure", "the disk is full\0 \udcff")
        tracker.finish("failed")
    assert _history(tracker, "train/loss") == [(0, 1.0), (1, 0.5)]
    run = tracker.client.get_run(tracker.run_id)
    assert (run.info.status, run.data.tags["failure"]) == ("FAILED", "the disk is full ?")


def test_a_damaged_outbox_is_a_warning_while_it_trains(
    uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = _begin(uri, tmp_path)
    tracker.add({"train/loss": 1.0}, 0)
    tracker.state_dict()
    (tmp_path / OUTBOX).write_bytes((tmp_path / OUTBOX).read_bytes().replace(b"metric", b"matrix"))
    with caplog.at_level(logging.WARNING):
        tracker.send()
        tracker.finish("finished")
    assert len(caplog.records) == 2
    assert "which is no point" in caplog.text
    last = caplog.records[-1].message
    assert "not delivered before that is mended" in last
    assert "--sync" not in last


def test_an_outbox_that_disappears_costs_its_unsent_lines_only(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = _begin(uri, tmp_path)
    tracker.add({"train/loss": 1.0}, 0)
    tracker.state_dict()
    tracker.send()
    (tmp_path / OUTBOX).unlink()
    with caplog.at_level(logging.WARNING):
        for step in (1, 2):
            tracker.add({"train/loss": 1.0 / step}, step)
            tracker.state_dict()
            tracker.send()
        tracker.finish("finished")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert _history(tracker, "train/loss") == [(0, 1.0), (1, 1.0), (2, 0.5)]
    assert not undelivered(tmp_path)


@pytest.fixture
def patience() -> Iterator[list[str]]:
    """How long sqlite was told to wait for a lock, each time that it was told."""
    told: list[str] = []

    def listen(_1: object, _2: object, statement: str, *_3: object) -> None:
        if "busy_timeout" in statement:
            told.append(statement.rpartition("= ")[2].rstrip(";"))

    event.listen(Engine, "after_cursor_execute", listen)
    yield told
    event.remove(Engine, "after_cursor_execute", listen)


@pytest.mark.parametrize("asked", [False, True])
def test_a_stop_does_not_wait_for_a_lock(
    asked: bool, uri: str, tmp_path: Path, patience: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = _begin(uri, tmp_path)
    tracker.add({"train/loss": 1.0}, 0)
    tracker.state_dict()
    monkeypatch.setattr(stopping, "asked", lambda: asked)
    patience.clear()
    tracker.send()
    assert set(patience) == {"2000" if asked else "20000"}
    patience.clear()
    tracker.finish("stopped")
    assert set(patience) == {"2000"}
    assert tracker.client.get_run(tracker.run_id).info.status == "KILLED"
    assert patience[-1] == "20000"  # afterwards it is as patient as ever
    assert (
        "MLFLOW_HTTP_REQUEST_TIMEOUT" not in os.environ or os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "20"
    )


def test_a_stop_tries_once_and_keeps_what_waits(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def locked(*_: object, **__: object) -> None:
        calls.append(os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"])
        raise MlflowException("database is locked")

    tracker, calls = _begin(uri, tmp_path), list[str]()
    tracker.add({"train/loss": 1.0}, 0)
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(tracker.client, "log_batch", locked)
        tracker.finish("stopped")
    assert calls == ["2"]
    assert "1 point, the end of the run did not reach" in caplog.text
    assert undelivered(tmp_path)
    resumed = _begin(uri, tmp_path)
    resumed.finish("finished")
    assert _history(resumed, "train/loss") == [(0, 1.0)]


def test_a_stop_while_a_store_has_not_answered_since_the_start_asks_nobody(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def away(*_: object, **__: object) -> None:
        calls.append(1)
        raise OSError("no route to host")

    _begin(uri, tmp_path).finish("stopped")
    calls = list[int]()
    monkeypatch.setattr(store, "PAUSES", ())
    monkeypatch.setattr(store, "open_store", away)
    resumed = _begin(uri, tmp_path)
    resumed.finish("stopped")
    assert calls == [1]
    assert "has not answered since" in caplog.text
    assert undelivered(tmp_path)


def test_what_a_resume_wanted_is_done_when_the_store_answers(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def away(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    first = _begin(uri, tmp_path)
    first.finish("stopped")
    monkeypatch.setattr(store, "PAUSES", ())
    resumed = MLflowTracker(uri)
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(store, "open_store", away)
        resumed.start(tmp_path, "a run", {"arm": "naive", "new": 1}, {"more": "x"})
        resumed.load_state_dict(None)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert first.client.get_run(first.run_id).info.status == "KILLED"
    resumed.backoff.clock = lambda: float("inf")
    resumed.send()
    run = first.client.get_run(first.run_id)
    assert (run.info.status, run.data.tags["status"], run.data.tags["more"]) == ("RUNNING", "running", "x")
    assert run.data.params == {"arm": "naive", "new": "1"}


def test_a_resume_whose_store_is_another_file_is_refused(uri: str, tmp_path: Path) -> None:
    _begin(uri, tmp_path).finish("stopped")
    other = f"sqlite:///{tmp_path}/elsewhere/mlflow.db"
    with pytest.raises(InputError, match=RUN_ID_FILE):
        _begin(other, tmp_path)
    assert not (tmp_path / "elsewhere").exists()
