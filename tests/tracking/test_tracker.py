"""The tracker: every point exactly once wherever the run is killed, and training never waits for it."""

import inspect
import math
import time
from pathlib import Path

import pytest
import torch
import yaml

from cl_moe.errors import InputError
from cl_moe.tracking.colours import colour
from cl_moe.tracking.outbox import RUN_ID_FILE
from cl_moe.tracking.tracker import MLflowTracker, NoTracker, Tracker


def _begin(uri: str, folder: Path, **params: object) -> MLflowTracker:
    tracker = MLflowTracker(uri)
    tracker.start(folder, "a run", {"arm": "naive", **params}, {"stream": "digits"})
    return tracker


def _history(tracker: MLflowTracker, key: str) -> list[tuple[int, float]]:
    return sorted((m.step, m.value) for m in tracker.client.get_metric_history(tracker.run_id, key))


def test_a_new_run(uri: str, tmp_path: Path) -> None:
    tracker = _begin(uri, tmp_path, depth=3)
    assert (tmp_path / RUN_ID_FILE).read_text().strip() == tracker.run_id
    run = tracker.client.get_run(tracker.run_id)
    assert run.data.params == {"arm": "naive", "depth": "3"}
    assert run.data.tags["stream"] == "digits"
    assert run.data.tags["status"] == "running"
    assert run.data.tags["mlflow.runColor"] == colour("naive")
    assert (run.info.run_name, run.info.status) == ("a run", "RUNNING")


def test_points_keep_key_step_value(uri: str, tmp_path: Path) -> None:
    tracker = _begin(uri, tmp_path)
    for step in range(1200):
        tracker.add({"train/loss": step / 7, "cost/seconds": float(step)}, step)
    tracker.add({"train/loss": math.nan, "train/tensor": torch.tensor(0.5)}, 1200)  # type: ignore[dict-item]
    state = tracker.state_dict()
    tracker.send()
    assert tracker.state_dict() == state
    assert _history(tracker, "train/loss") == [(step, step / 7) for step in range(1200)]
    assert _history(tracker, "train/tensor") == [(1200, 0.5)]
    stamps = [m.timestamp for m in tracker.client.get_metric_history(tracker.run_id, "train/loss")]
    assert len(set(stamps)) == 1200


@pytest.mark.parametrize("bad", ["a=b", "a[0]", "/a", ""])
def test_a_bad_name_is_found_when_it_comes(bad: str, uri: str, tmp_path: Path) -> None:
    with pytest.raises(InputError):
        MLflowTracker(uri).add({bad: 1.0}, 0)
    with pytest.raises(InputError):
        MLflowTracker(uri).start(tmp_path, "x", {bad: 1}, {})
    assert not (tmp_path / RUN_ID_FILE).exists()


@pytest.mark.parametrize("killed", ["before the checkpoint", "before send", "within send", "after send"])
def test_exactly_once_after_a_kill(
    killed: str, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker, file = _begin(uri, tmp_path), tmp_path / "checkpoint.pt"
    torch.save(tracker.state_dict() | {"at": 0}, file)

    def train(tracker: MLflowTracker, first: int, last: int) -> None:
        for step in range(first, last):
            tracker.add({"train/loss": 1.0 / (step + 1), "train/accuracy": step / 3000}, step)

    train(tracker, 0, 1500)
    if killed != "before the checkpoint":
        torch.save(tracker.state_dict() | {"at": 1500}, file)
    if killed in ("within send", "after send"):
        real, calls = tracker.client.log_batch, []

        def log_batch(*args: object, **kwargs: object) -> None:
            calls.append(1)
            if killed == "within send" and len(calls) == 2:
                raise KeyboardInterrupt
            real(*args, **kwargs)  # type: ignore[arg-type]

        monkeypatch.setattr(tracker.client, "log_batch", log_batch)
        if killed == "within send":
            with pytest.raises(KeyboardInterrupt):
                tracker.send()
        else:
            tracker.send()
    state = torch.load(file, weights_only=True)
    resumed = _begin(uri, tmp_path)
    assert resumed.run_id == tracker.run_id
    resumed.load_state_dict(state)
    train(resumed, state["at"], 3000)
    resumed.send()
    resumed.finish("finished")
    assert _history(resumed, "train/loss") == [(step, 1.0 / (step + 1)) for step in range(3000)]
    assert _history(resumed, "train/accuracy") == [(step, step / 3000) for step in range(3000)]


def test_exactly_once_after_falling_back_to_an_older_checkpoint(uri: str, tmp_path: Path) -> None:
    tracker = _begin(uri, tmp_path)
    tracker.add({"stream/forgetting": 0.1}, 1)
    old = tracker.state_dict()
    tracker.send()
    tracker.add({"stream/forgetting": 0.2}, 2)
    tracker.finish("failed")  # also sends what no checkpoint has
    resumed = _begin(uri, tmp_path)
    resumed.load_state_dict(old)
    resumed.add({"stream/forgetting": 0.2, "stream/new": 1.0}, 2)
    resumed.add({"stream/forgetting": 0.3}, 3)
    resumed.state_dict()
    resumed.send()
    assert _history(resumed, "stream/forgetting") == [(1, 0.1), (2, 0.2), (3, 0.3)]
    assert _history(resumed, "stream/new") == [(2, 1.0)]


def test_reopening_keeps_params_and_tags(uri: str, tmp_path: Path) -> None:
    tracker = _begin(uri, tmp_path, depth=3)
    tracker.tag("git_commit", "abc")
    tracker.finish("stopped")
    again = MLflowTracker(uri)
    run_id = again.start(
        tmp_path, "other", {"arm": "naive", "depth": 4, "new": 1}, {"git_commit": "def", "x": "y"}
    )
    run = again.client.get_run(run_id)
    assert run_id == tracker.run_id
    assert run.data.params == {"arm": "naive", "depth": "3", "new": "1"}
    assert run.data.tags["git_commit"] == "abc"
    assert (run.data.tags["status"], run.data.tags["x"], run.info.status) == ("running", "y", "RUNNING")


@pytest.mark.parametrize("name", ["mlflow.runName", "status", "output_dir", "start_token"])
def test_a_tag_that_means_something_else_is_refused(name: str, uri: str, tmp_path: Path) -> None:
    tracker = _begin(uri, tmp_path)
    with pytest.raises(InputError, match=name):
        tracker.tag(name, "x")


def test_a_folder_whose_run_is_unknown(uri: str, tmp_path: Path) -> None:
    (tmp_path / RUN_ID_FILE).write_text("0" * 32)
    with pytest.raises(InputError, match=r"tracking\.uri"):
        _begin(uri, tmp_path)
    (tmp_path / RUN_ID_FILE).unlink()
    tracker = _begin(uri, tmp_path)
    tracker.client.delete_run(tracker.run_id)
    with pytest.raises(InputError, match=RUN_ID_FILE):
        _begin(uri, tmp_path)


def test_many_and_long_params(uri: str, tmp_path: Path) -> None:
    params = {f"p{i}": i for i in range(250)} | {"long": "x" * 7000, "fits": "y" * 6000}
    stored = (tracker := _begin(uri, tmp_path, **params)).client.get_run(tracker.run_id).data.params
    assert len(stored) == 253
    assert stored["fits"] == "y" * 6000
    assert len(stored["long"]) == 6000
    assert stored["long"].endswith("[cut: 7000 characters; the whole value is in config.yaml]")


@pytest.mark.parametrize(
    ("status", "theirs"), [("finished", "FINISHED"), ("failed", "FAILED"), ("stopped", "KILLED")]
)
def test_status(status: str, theirs: str, uri: str, tmp_path: Path) -> None:
    tracker = _begin(uri, tmp_path)
    tracker.add({"train/loss": 1.0}, 0)
    tracker.finish(status)  # type: ignore[arg-type]
    run = tracker.client.get_run(tracker.run_id)
    assert (run.info.status, run.data.tags["status"], run.data.metrics) == (
        theirs,
        status,
        {"train/loss": 1.0},
    )
    assert run.info.end_time is not None


def test_artifact(uri: str, tmp_path: Path) -> None:
    tracker = _begin(uri, tmp_path)
    (tmp_path / "table.csv").write_text("a,b")
    tracker.artifact(tmp_path / "table.csv")
    tracker.artifact(tmp_path / "table.csv", "sub")
    assert {file.path for file in tracker.client.list_artifacts(tracker.run_id)} == {"table.csv", "sub"}
    assert (
        tmp_path / "mlartifacts" / tracker.run_id / "artifacts" / "sub" / "table.csv"
    ).read_text() == "a,b"
    with pytest.raises(FileNotFoundError):
        tracker.artifact(tmp_path / "missing.csv")
    with pytest.raises(InputError, match="inside the run's folder"):
        tracker.artifact(Path(__file__))


def test_bad_uri_at_construction() -> None:
    with pytest.raises(InputError, match=r"tracking\.uri"):
        MLflowTracker("mlruns")


def test_not_started(uri: str) -> None:
    with pytest.raises(RuntimeError, match="not started"):
        _ = MLflowTracker(uri).client


def test_no_tracker_leaves_nothing(tmp_path: Path) -> None:
    tracker: Tracker = NoTracker()
    assert tracker.start(tmp_path, "x", {"arm": 1}, {}) == ""
    tracker.add({"a": 1.0}, 0)
    assert tracker.state_dict() == {}
    tracker.load_state_dict({})
    tracker.load_state_dict(None)
    tracker.send()
    tracker.tag("a", "b")
    tracker.artifact(tmp_path / "missing")
    tracker.finish("finished")
    assert not list(tmp_path.iterdir())


def test_time_goes_on_where_the_checkpoint_was(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = _begin(uri, tmp_path)
    tracker.add({"train/loss": 1.0}, 0)
    state = tracker.state_dict()
    tracker.send()
    monkeypatch.setattr(time, "time_ns", lambda: 10**15)  # the machine's clock went back
    resumed = _begin(uri, tmp_path)
    resumed.load_state_dict(state)
    resumed.add({"train/loss": 0.5}, 1)
    resumed.finish("finished")
    history = resumed.client.get_metric_history(resumed.run_id, "train/loss")
    first, second = sorted(history, key=lambda metric: metric.step)
    assert first.timestamp < second.timestamp


@pytest.mark.parametrize(("name", "of"), [("mlflow", MLflowTracker), ("none", NoTracker)])
def test_yaml_is_the_signature(name: str, of: type) -> None:
    import conf

    file = Path(next(iter(conf.__path__))) / "tracking" / f"{name}.yaml"
    keys = yaml.safe_load(file.read_text())
    assert keys.pop("_target_") == f"cl_moe.tracking.tracker.{of.__name__}"
    parameters = inspect.signature(of.__init__).parameters if of is MLflowTracker else {}
    assert set(keys) == set(parameters) - {"self"}
