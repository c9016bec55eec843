"""How a run gets its one MLflow run, whatever is killed, moved or planted meanwhile."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

import cl_moe.tracking.tracker as tracker_module
from cl_moe import files
from cl_moe.errors import InputError
from cl_moe.tracking import store
from cl_moe.tracking.outbox import OUTBOX, RUN_ID_FILE, START_FILE
from cl_moe.tracking.tracker import MLflowTracker


def _begin(uri: str, folder: Path, **params: object) -> MLflowTracker:
    folder.mkdir(exist_ok=True)
    tracker = MLflowTracker(uri)
    tracker.start(folder, "a run", {"arm": "naive", **params}, {"stream": "digits"})
    return tracker


def test_a_run_whose_folder_was_moved_is_found_there(uri: str, tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    first = MLflowTracker(uri)
    run_id = first.start(old, "a run", {}, {"output_dir": str(old), "sweep": "none"})
    first.finish("stopped")
    old.rename(new)
    MLflowTracker(uri).start(new, "a run", {}, {"output_dir": str(new), "sweep": "other"})
    assert store.find_run(run_id, uri)["output_dir"] == str(new)
    assert store.find_run(run_id, uri)["sweep"] == "none"


def _all_runs(uri: str) -> list[str]:
    client = store.open_store(uri)
    experiments = [one.experiment_id for one in client.search_experiments()]
    return [run.info.run_id for run in client.search_runs(experiments)]


@pytest.mark.parametrize("killed", ["before MLflow has it", "before its id is written", "after"])
def test_a_kill_while_a_run_is_made_leaves_no_second_one(
    killed: str, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    def kill_at_the_id(path: Path, content: bytes) -> None:
        if path.name == RUN_ID_FILE:
            raise KeyboardInterrupt
        files.write_atomically(path, content)

    _begin(uri, tmp_path / "other")
    with monkeypatch.context() as patch:
        if killed == "before MLflow has it":
            patch.setattr(MlflowClient, "create_run", kill)
        elif killed == "after":
            patch.setattr(tracker_module, "log_params", kill)
        else:
            patch.setattr(tracker_module, "write_atomically", kill_at_the_id)
        with pytest.raises(KeyboardInterrupt):
            _begin(uri, tmp_path / "run")
    assert (tmp_path / "run" / START_FILE).exists() == (killed != "after")
    tracker = _begin(uri, tmp_path / "run", depth=3)
    assert len(_all_runs(uri)) == 2
    assert not (tmp_path / "run" / START_FILE).exists()
    tracker.add({"train/loss": 1.0}, 0)
    tracker.finish("finished")
    (point,) = tracker.client.get_metric_history(tracker.run_id, "train/loss")
    assert (point.step, point.value) == (0, 1.0)
    run = tracker.client.get_run(tracker.run_id)
    assert run.data.params == {"arm": "naive", "depth": "3"}
    assert (run.data.tags["stream"], run.info.status) == ("digits", "FINISHED")


def test_a_run_that_was_made_without_an_answer_is_not_made_again(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = MlflowClient.create_run

    def deaf(*arguments: object, **named: object) -> None:
        make(*arguments, **named)  # type: ignore[arg-type]
        raise MlflowException("the answer was lost")

    monkeypatch.setattr(MlflowClient, "create_run", deaf)
    tracker = _begin(uri, tmp_path)
    assert _all_runs(uri) == [tracker.run_id]


@pytest.mark.parametrize("name", [RUN_ID_FILE, START_FILE, OUTBOX])
def test_nothing_of_a_start_is_written_through_a_link(name: str, uri: str, tmp_path: Path) -> None:
    folder, precious = tmp_path / "run", tmp_path / "precious"
    folder.mkdir()
    precious.write_text("mine\n")
    for leftover in (f"{RUN_ID_FILE}.part", f".{name}.{os.getpid()}"):
        (folder / leftover).unlink(missing_ok=True)
        (folder / leftover).symlink_to(precious)
    tracker = _begin(uri, folder)  # over what was left beside it
    assert (folder / RUN_ID_FILE).read_text().strip() == tracker.run_id
    assert not (folder / RUN_ID_FILE).is_symlink()
    (folder / RUN_ID_FILE).unlink()
    (folder / name).symlink_to(precious)
    with pytest.raises(InputError, match=name):
        _begin(uri, folder)
    assert precious.read_text() == "mine\n"
    assert _all_runs(uri) == [tracker.run_id]
