"""The store: one file whoever comes first, quiet, and plain words for a bad address."""

import logging
import multiprocessing
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from cl_moe.errors import InputError, RunFailedError
from cl_moe.tracking import store


def _start(
    uri: str, barrier: "multiprocessing.synchronize.Barrier", answers: "multiprocessing.Queue[object]"
) -> None:
    barrier.wait()
    client = store.open_store(uri)
    experiment = store.experiment_id(client, "together")
    answers.put((experiment, client.create_run(experiment).info.run_id))


def test_four_processes_on_one_fresh_store(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, answers = context.Barrier(4), context.Queue()
    uri = f"sqlite:///{tmp_path}/new folder/mlflow.db"
    workers = [context.Process(target=_start, args=(uri, barrier, answers)) for _ in range(4)]
    for worker in workers:
        worker.start()
    found = [answers.get(timeout=300) for _ in workers]
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0, 0]
    assert len({experiment for experiment, _ in found}) == 1
    runs = store.open_store(uri).search_runs([found[0][0]])
    assert {run.info.run_id for run in runs} == {run_id for _, run_id in found}
    assert not list(tmp_path.rglob("*.part"))


def test_a_half_made_store_is_made_again(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db.part").write_bytes(b"left by a killed process")
    (tmp_path / "mlflow.db").touch()
    client = store.open_store(f"sqlite:///{tmp_path}/mlflow.db")
    assert client.search_experiments()[0].name == "Default"


def test_experiment_is_made_once_with_absolute_artifacts(uri: str, tmp_path: Path) -> None:
    client = store.open_store(uri)
    first = store.experiment_id(client, "cl-moe")
    assert store.experiment_id(client, "cl-moe") == first
    assert client.get_experiment(first).artifact_location == str(tmp_path / "mlartifacts")


def test_relative_uri_is_fixed_at_once(
    ready_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert store.absolute_uri(store.DEFAULT_URI) == f"sqlite:///{tmp_path}/mlflow.db"
    shutil.copy(ready_store, tmp_path / "mlflow.db")
    client = store.open_store("sqlite:///mlflow.db")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    store.experiment_id(client, "cl-moe")
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize(
    "bad",
    ["mlruns", "./mlruns", "file:///tmp/mlruns", "sqlite://", "sqlite:///", "sqlite:///:memory:", "sqlite:///runs/",
     "postgresql://me@host/db", "http://", "databricks", ""],
)  # fmt: skip
def test_bad_uri(bad: str) -> None:
    with pytest.raises(InputError) as error:
        store.open_store(bad)
    assert error.value.key == "tracking.uri"
    assert "sqlite:///" in error.value.allowed
    assert "http" in error.value.allowed


@pytest.mark.parametrize("good", ["http://127.0.0.1:5000", "https://mlflow.example/path"])
def test_a_server_passes_through_uncontacted(good: str) -> None:
    assert store.open_store(good).tracking_uri == good
    assert store.database(good) is None


def test_not_a_store(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("not a database at all " * 100)
    with pytest.raises(InputError, match=r"tracking\.uri"):
        store.open_store(f"sqlite:///{tmp_path}/text.db")
    with pytest.raises(InputError, match="no such file"):
        store.open_store(f"sqlite:///{tmp_path}/missing.db", create=False)
    assert not (tmp_path / "missing.db").exists()


def test_store_of_another_mlflow(uri: str, tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "mlflow.db")
    connection.execute("UPDATE alembic_version SET version_num = 'other'")
    connection.commit()
    connection.close()
    with pytest.raises(InputError, match="schema"):
        store.open_store(uri)


def test_bad_experiment(uri: str) -> None:
    client = store.open_store(uri)
    with pytest.raises(InputError, match=r"tracking\.experiment"):
        store.experiment_id(client, " ")
    client.delete_experiment(store.experiment_id(client, "gone"))
    with pytest.raises(InputError, match="restore"):
        store.experiment_id(client, "gone")


def test_find_run(uri: str) -> None:
    client = store.open_store(uri)
    run = client.create_run(store.experiment_id(client, "cl-moe"), tags={"output_dir": "/some/where"})
    assert store.find_run(run.info.run_id, uri)["output_dir"] == "/some/where"
    client.delete_run(run.info.run_id)
    for unknown in (run.info.run_id, "0" * 32, "no such id"):
        with pytest.raises(InputError, match="resume"):
            store.find_run(unknown, uri)


def test_a_silent_server_is_a_named_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(store, "PAUSES", (0.0,))
    with pytest.raises(RunFailedError, match=r"http://127.0.0.1:9.*does not answer"):
        store.find_run("0" * 32, "http://127.0.0.1:9")


@pytest.mark.parametrize("name", ["a/b", "experts/layer_00/usage", "a b-c.d:e_f", "ä"])
def test_good_names(name: str) -> None:
    store.check_name(name, "metric")


@pytest.mark.parametrize(
    "name", ["", "a=b", "a[0]", "a@b", "/a", "a//b", "a/../b", "..", ".", "a/", "x" * 251]
)
def test_bad_names(name: str) -> None:
    with pytest.raises(InputError):
        store.check_name(name, "metric")


def test_a_fresh_store_says_nothing(tmp_path: Path) -> None:
    code = f"from cl_moe.tracking.store import open_store; open_store('sqlite:///{tmp_path}/mlflow.db')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_telemetry_is_off_before_mlflow() -> None:
    code = "import sys, os\nimport cl_moe.tracking.store as s\nassert 'mlflow' not in sys.modules\n"
    code += "s.load_mlflow()\nfrom mlflow.telemetry.utils import is_telemetry_disabled as off\nassert off()"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW")}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_loggers_are_quiet() -> None:
    store.load_mlflow()
    assert not logging.getLogger("mlflow.anything").isEnabledFor(logging.INFO)
