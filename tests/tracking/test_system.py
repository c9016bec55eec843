"""``tracking.system_metrics``: MLflow watches the machine while a run is open, and only then."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from mlflow import MlflowClient

from cl_moe.errors import InputError
from cl_moe.tracking import figures, system
from cl_moe.tracking.tracker import MLflowTracker

pytest.importorskip("psutil", reason="the extra `system` is not installed")
KEY = "system/cpu_utilization_percentage"


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.05")


def begin(uri: str, folder: Path) -> MLflowTracker:
    folder.mkdir(exist_ok=True)
    tracker = MLflowTracker(uri, system_metrics=True)
    tracker.start(folder, "a run", {}, {})
    return tracker


def watched() -> bool:
    return any("SystemMetricsMonitor" in thread.name for thread in threading.enumerate())


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        threading.Event().wait(0.02)


def steps(tracker: MLflowTracker) -> list[int]:
    return [metric.step for metric in tracker.client.get_metric_history(tracker.run_id, KEY)]


def test_points_come_while_the_run_is_open_and_go_on_after_a_restart(uri: str, tmp_path: Path) -> None:
    first = begin(uri, tmp_path / "run")
    until(lambda: len(steps(first)) >= 2)
    first.finish("stopped")
    assert not watched()
    before = steps(first)
    second = begin(uri, tmp_path / "run")
    assert second.run_id == first.run_id
    until(lambda: len(steps(second)) > len(before))
    second.finish("finished")
    assert not watched()
    after = sorted(steps(second))
    assert len(set(after)) == len(after), "no step twice"
    assert all(other - one == 1 for one, other in pairwise(after))


def test_a_store_that_goes_away_ends_the_watching_and_nothing_else(uri: str, tmp_path: Path) -> None:
    tracker = begin(uri, tmp_path / "run")
    until(lambda: len(steps(tracker)) >= 1)
    database = tmp_path / "mlflow.db"
    database.rename(tmp_path / "away.db")
    tracker.add({"train/loss": 1.0}, 0)
    tracker.state_dict()
    tracker.send()
    tracker.finish("finished")
    assert not watched()
    (tmp_path / "away.db").rename(database)
    assert MlflowClient(uri).get_run(tracker.run_id).info.status == "RUNNING", "what waits is in the outbox"


def test_the_end_does_not_wait_for_a_store_that_hangs(uri: str, tmp_path: Path, monkeypatch) -> None:
    tracker, gate = begin(uri, tmp_path / "run"), threading.Event()
    monkeypatch.setattr(system, "_PATIENCE", 0.05)
    with monkeypatch.context() as patch:
        patch.setattr(
            "mlflow.system_metrics.system_metrics_monitor.SystemMetricsMonitor.finish",
            lambda self: gate.wait(60),
        )
        monitor = tracker._system._monitor
        tracker.finish("finished")
        assert tracker.client.get_run(tracker.run_id).info.status == "FINISHED"
    gate.set()
    monitor.finish()


def test_without_psutil_it_is_refused_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'cl-moe\[system\]'") as caught:
        MLflowTracker(system_metrics=True)
    assert caught.value.key == "tracking.system_metrics"
    MLflowTracker()


def test_a_run_of_the_command_line_has_the_bits_of_one_that_is_not_watched(
    command: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("trainer.epochs=1", "stream.tune_on_first=1", "model.width=16", "layer=moe", "layer.hidden=8")
    monkeypatch.setattr(figures, "write_figures", lambda record, folder: [])
    for name, watched_too in (("plain", "false"), ("watched", "true")):
        done = command(*words, f"hydra.run.dir={name}", f"tracking.system_metrics={watched_too}")
        assert done.status == 0, done.text
    one, other = ((tmp_path / name / "accuracy_matrix.csv").read_bytes() for name in ("plain", "watched"))
    assert one == other
    weights = [(tmp_path / name / "model" / "weights.pt").read_bytes() for name in ("plain", "watched")]
    assert weights[0] == weights[1]
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    keys = [
        client.get_run((tmp_path / name / "mlflow_run_id").read_text().strip()).data.metrics
        for name in ("plain", "watched")
    ]
    assert KEY in keys[1]
    assert not any(key.startswith("system/") for key in keys[0])
