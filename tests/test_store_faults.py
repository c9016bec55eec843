"""Whole runs beside stores that vanish, are locked, or fresh and crowded, or are to be local only."""

from __future__ import annotations

import contextlib
import os
import runpy
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from sqlalchemy import event
from sqlalchemy.engine import Engine

from cl_moe.tracking import compare, store
from cl_moe.tracking.outbox import undelivered
from cl_moe.tracking.tracker import MLflowTracker

CHAOS = runpy.run_path(str(Path(__file__).with_name("chaos.py")))
SMALL = ("hydra.run.dir=outputs/one", "trainer.epochs=1", "stream.tune_on_first=2", "trainer.log_every=4")
WALL_CLOCK = {f"cost/{name}seconds" for name in ("", "eval_", "diagnostics_")}
WALL_CLOCK |= {"cost/tokens_per_second", "cost/peak_memory_bytes"}
Points = dict[str, list[tuple[int, float]]]


class Server:
    """A real MLflow server of our own on the loopback interface, over one sqlite file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        words = ["server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        words += ["--backend-store-uri", f"sqlite:///{self.folder}/server.db"]
        words += ["--artifacts-destination", str(self.folder / "served")]
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", *words],
                **{"stdout": log, "stderr": log, "start_new_session": True},
                env=os.environ
                | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            )
        deadline = time.monotonic() + 120
        while not self._answers():
            assert time.monotonic() < deadline, (self.folder / "server.log").read_text()
            time.sleep(0.05)

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)  # the group is its own: the server and its worker
            self.process.wait()
            self.process = None

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=5) as answer:
            return answer.status == 200
        return False


@pytest.fixture
def server(ready_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # a dead server is known by the first refusal
    monkeypatch.setattr(store, "PAUSES", (0.0,))
    shutil.copy(ready_store, tmp_path / "server.db")
    server = Server(tmp_path)
    server.start()
    yield server
    server.kill()


def runs_of(client: MlflowClient) -> list[Run]:
    return client.search_runs([one.experiment_id for one in client.search_experiments()])


def points(uri: str) -> list[Points]:
    """For each run, all of them finished, every point as often as it stands in the store."""
    client = MlflowClient(uri)
    runs = runs_of(client)
    assert {(run.info.status, run.data.tags["status"]) for run in runs} == {("FINISHED", "finished")}
    return [
        {
            key: sorted(
                (m.step, 0.0 if key in WALL_CLOCK else m.value)
                for m in client.get_metric_history(run.info.run_id, key)
            )
            for key in run.data.metrics
        }
        for run in runs
    ]


def artifacts(client: MlflowClient) -> set[str]:
    (run,) = runs_of(client)
    return {file.path for file in client.list_artifacts(run.info.run_id)}


def sync(folder: Path) -> int:
    with contextlib.chdir(folder):
        try:
            return compare.main(["--sync"]) or 0  # type: ignore[func-returns-value]
        except SystemExit as ended:
            return int(ended.code or 0)


@pytest.fixture(scope="module")
def undisturbed(command_in: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small run with nothing in its way."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert command_in(folder, *SMALL).status == 0
    return folder


def check_whole(uri: str, undisturbed: Path) -> None:
    local = f"sqlite:///{undisturbed}/mlflow.db"
    assert points(uri) == points(local)
    assert artifacts(MlflowClient(uri)) == artifacts(MlflowClient(local))


def at_send(monkeypatch: pytest.MonkeyPatch, count: int, act: Callable[[], object]) -> None:
    """Has something happen just before the tracker's ``count``-th sending."""
    send, calls = MLflowTracker.send, []

    def eventful(tracker: MLflowTracker) -> None:
        calls.append(1)
        if len(calls) == count:
            act()
        send(tracker)

    monkeypatch.setattr(MLflowTracker, "send", eventful)


@pytest.mark.slow
def test_a_server_killed_in_mid_run_costs_nothing(
    server: Server, undisturbed: Path, command_in: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_send(monkeypatch, 2, server.kill)
    done = command_in(tmp_path, *SMALL, f"tracking.uri={server.uri}")
    assert done.status == 0, done.text
    assert done.text.count("takes no numbers now") == 1
    assert done.text.count("cl-moe-compare --sync") == 1
    assert undelivered(tmp_path / "outputs/one")
    assert sync(tmp_path) == 1  # it is still dead
    server.start()
    for _ in range(2):
        assert sync(tmp_path) == 0
        check_whole(server.uri, undisturbed)


def test_a_server_takes_a_run_and_its_resume(server: Server, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for life in range(2):
        tracker = MLflowTracker(server.uri)
        tracker.start(folder, "a run", {"arm": "x"}, {"stream": "digits"})
        tracker.load_state_dict(None)
        tracker.add({"train/loss": 1.0}, 0)
        tracker.add({"train/loss": 0.5}, 1)
        tracker.state_dict()
        tracker.send()
        if life == 0:
            server.kill()
        (folder / "table.csv").write_text("a,b")
        tracker.artifact(folder / "table.csv")
        tracker.add({"train/loss": 0.25}, 2)
        tracker.finish("finished")
        assert undelivered(folder) == (life == 0)
        if life == 0:
            server.start()
    assert points(server.uri) == [{"train/loss": [(0, 1.0), (1, 0.5), (2, 0.25)]}]
    assert artifacts(MlflowClient(server.uri)) == {"table.csv"}


@pytest.mark.slow
def test_a_file_that_vanishes_and_comes_back(
    undisturbed: Path, command_in: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = tmp_path / "mlflow.db"
    monkeypatch.setattr(store, "PAUSES", ())
    at_send(monkeypatch, 2, lambda: database.rename(tmp_path / "moved.db"))
    done = command_in(tmp_path, *SMALL)
    assert (done.status, "was moved, removed or replaced" in done.text) == (0, True), done.text
    (tmp_path / "moved.db").rename(database)
    assert sync(tmp_path) == 0
    check_whole(f"sqlite:///{database}", undisturbed)


def test_a_file_that_another_program_locks(
    undisturbed: Path, command_in: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hasty(_1: object, _2: object, statement: str, given: object, *_3: object) -> tuple[str, object]:
        return statement.replace("busy_timeout = 20000", "busy_timeout = 20"), given

    monkeypatch.setattr(store, "PAUSES", ())
    event.listen(Engine, "before_cursor_execute", hasty, retval=True)
    other: list[sqlite3.Connection] = []

    def lock() -> None:
        other.append(sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None))
        other[0].execute("BEGIN EXCLUSIVE")

    at_send(monkeypatch, 2, lock)
    try:
        done = command_in(tmp_path, *SMALL)
        assert done.status == 0, done.text
        assert done.text.count("takes no numbers now") == 1
        assert "database is locked" in done.text
        other[0].rollback()
    finally:
        event.remove(Engine, "before_cursor_execute", hasty)
        for connection in other:
            connection.close()
    assert sync(tmp_path) == 0
    check_whole(f"sqlite:///{tmp_path}/mlflow.db", undisturbed)


@pytest.mark.slow
def test_a_resume_does_not_need_its_store(
    undisturbed: Path, command_in: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dead(*_: object, **__: object) -> NoReturn:
        raise OSError("no route to host")

    def stop() -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "PAUSES", ())
    with monkeypatch.context() as patch:
        at_send(patch, 2, stop)
        assert command_in(tmp_path, *SMALL).status == 130
    with monkeypatch.context() as patch:
        patch.setattr(store, "open_store", dead)
        done = command_in(tmp_path, "resume=outputs/one")
    assert done.status == 0, done.text
    assert "no route to host" in done.text
    assert sync(tmp_path) == 0
    check_whole(f"sqlite:///{tmp_path}/mlflow.db", undisturbed)


def test_a_local_store_needs_no_network_and_nothing_listens(
    undisturbed: Path, command_in: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, tried = socket.socket, list[str]()

    def refused(name: str) -> Callable[..., NoReturn]:
        def call(*arguments: object, **_: object) -> NoReturn:
            tried.append(f"{name} {arguments[1:]}")
            raise OSError(f"{name}: this test has no network")

        return call

    class Deaf(real):  # type: ignore[misc,valid-type]
        connect, connect_ex, bind, listen, sendto = map(
            refused, ("connect", "connect_ex", "bind", "listen", "sendto")
        )

    with monkeypatch.context() as patch:
        patch.setattr(socket, "socket", Deaf)
        patch.setattr(socket, "getaddrinfo", refused("getaddrinfo"))
        with pytest.raises(OSError, match="no network"):
            socket.create_connection(("127.0.0.1", 9))
        tried.clear()
        done = command_in(tmp_path, *SMALL)
        assert done.status == 0, done.text
        assert sync(tmp_path) == 0
    assert tried == []
    check_whole(f"sqlite:///{tmp_path}/mlflow.db", undisturbed)


@pytest.mark.slow
def test_eight_jobs_on_one_fresh_store(undisturbed: Path, tmp_path: Path) -> None:
    context = CHAOS["forkserver"]()
    words = [*SMALL, f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"]
    jobs = []
    for number in range(8):
        (tmp_path / str(number)).mkdir()
        jobs.append(CHAOS["start"](context, tmp_path / str(number), words))
    for job in jobs:
        job.join(300)
    logs = [(tmp_path / str(number) / "log.txt").read_text() for number in range(8)]
    assert [job.exitcode for job in jobs] == [0] * 8, logs
    assert points(f"sqlite:///{tmp_path}/mlflow.db") == points(f"sqlite:///{undisturbed}/mlflow.db") * 8
