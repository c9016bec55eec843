"""``--sync``: what waits is delivered, what cannot be true is refused, who is alive is left alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from filelock import FileLock
from mlflow import MlflowClient

from cl_moe.tracking import store
from cl_moe.tracking.compare import main
from cl_moe.tracking.entries import Point, Tag, to_line
from cl_moe.tracking.outbox import OUTBOX, RUN_ID_FILE, SENT, Outbox, undelivered
from cl_moe.tracking.tracker import MLflowTracker


@pytest.fixture
def run(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """The folder of a run that ended while its store was moved away; the store is back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(store, "PAUSES", ())
    database = tmp_path / "mlflow.db"

    def make(name: str = "outputs/day/hour", end: bool = True) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(yaml.safe_dump({"tracking": {"uri": "sqlite:///mlflow.db"}}))
        tracker = MLflowTracker(uri)
        tracker.start(folder, "a run", {"arm": "x"}, {})
        tracker.add({"train/loss": 0.5}, 0)
        tracker.state_dict()
        tracker.send()
        database.rename(tmp_path / "away.db")
        tracker.add({"train/loss": 0.25, "train/inf": float("inf")}, 1)
        tracker.state_dict()
        tracker.send()
        (folder / "table.csv").write_text("a,b")
        tracker.artifact(folder / "table.csv", "sub")
        tracker.tag("note", "x")
        if end:
            tracker.finish("finished")
        assert not database.exists()
        (tmp_path / "away.db").rename(database)
        return folder

    return make


def sync(*arguments: str | Path) -> int:
    try:
        main(["--sync", *map(str, arguments)])
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def check_delivered(uri: str, folder: Path, ended: bool = True) -> None:
    client, run_id = MlflowClient(uri), (folder / RUN_ID_FILE).read_text().strip()
    run = client.get_run(run_id)
    history = client.get_metric_history(run_id, "train/loss")
    assert sorted((m.step, m.value) for m in history) == [(0, 0.5), (1, 0.25)]
    assert len(client.get_metric_history(run_id, "train/inf")) == 1
    assert run.data.tags["note"] == "x"
    assert [file.path for file in client.list_artifacts(run_id, "sub")] == ["sub/table.csv"]
    assert (run.info.status, run.data.tags["status"]) == (
        ("FINISHED", "finished") if ended else ("RUNNING", "running")
    )
    assert not undelivered(folder)


def test_delivers_all_under_the_usual_places_once(
    run: Callable[..., Path], uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = run(), run("multirun/day/hour/3")
    assert sync() == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[1] for line in lines] == [
        "delivered 2 points, 1 tag, 1 file, the end of the run"
    ] * 2
    check_delivered(uri, one)
    check_delivered(uri, two)
    assert sync() == 0
    assert capsys.readouterr().out.startswith("Nothing waits: 2 outboxes")
    (one / SENT).unlink()
    assert sync(one) == 0
    check_delivered(uri, one)


def test_a_run_that_was_killed_stays_open(run: Callable[..., Path], uri: str) -> None:
    folder = run(end=False)
    assert sync(folder) == 0
    check_delivered(uri, folder, ended=False)


def test_the_end_has_the_time_of_the_end(run: Callable[..., Path], uri: str) -> None:
    folder = run()
    last = (folder / OUTBOX).read_text().splitlines()[-1]
    assert sync(folder) == 0
    ended = MlflowClient(uri).get_run((folder / RUN_ID_FILE).read_text().strip()).info.end_time
    assert f'"ms": {ended}}}' in last


def test_who_is_alive_is_left_alone(run: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = run()
    with FileLock(folder / ".lock"):
        assert sync() == 0
    assert "is running" in capsys.readouterr().out
    assert undelivered(folder)


def test_a_store_that_is_away_leaves_all_waiting(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    one, two = run(), run("outputs/two")
    assert sync("--uri", "http://127.0.0.1:9") == 1
    shown = capsys.readouterr()
    assert (
        shown.out.count("delivered nothing; 2 points, 1 tag, 1 file, the end of the run still waiting") == 2
    )
    assert shown.err.count("2 of 2 runs were not delivered whole") == 1
    assert undelivered(one)
    assert undelivered(two)


def test_a_missing_file_is_named_and_the_rest_delivered(
    run: Callable[..., Path], uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run()
    (folder / "table.csv").unlink()
    assert sync() == 1
    assert "table.csv is gone" in capsys.readouterr().out
    assert MlflowClient(uri).get_run((folder / RUN_ID_FILE).read_text().strip()).info.status == "FINISHED"
    assert sync() == 0


@pytest.mark.parametrize(
    "line",
    ['{"artifact": "../../../secret", "folder": ""}', '{"artifact": "/etc/hostname", "folder": ""}', "junk"],
)
def test_an_outbox_that_no_run_wrote_is_refused_before_anything_is_sent(
    line: str, run: Callable[..., Path], uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "secret").write_text("x")
    good, bad = run(), run("outputs/bad")
    with (bad / OUTBOX).open("a") as file:
        file.write(f"{line}\n")
    assert sync() == 2
    message = capsys.readouterr().err
    assert message.count("got: ") == 1
    assert str(bad / OUTBOX) in message.replace(str(Path("outputs/bad") / OUTBOX), str(bad / OUTBOX))
    check_delivered(uri, good)
    bad_id = (bad / RUN_ID_FILE).read_text().strip()
    assert len(MlflowClient(uri).get_metric_history(bad_id, "train/loss")) == 1


def test_the_folder_of_a_sweep_stands_for_its_runs(
    run: Callable[..., Path], uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [run(f"multirun/sweep/{job}") for job in range(2)]
    other = run("multirun/other/0")
    (tmp_path / "empty").mkdir()
    assert sync("multirun/sweep", runs[0]) == 0
    assert capsys.readouterr().out.count("delivered 2 points") == 2
    for folder in runs:
        check_delivered(uri, folder)
    assert undelivered(other)
    assert sync("empty", "multirun/other") == 2
    assert "empty, without" in capsys.readouterr().err
    check_delivered(uri, other)


def test_a_link_in_place_of_an_outbox_is_refused(run: Callable[..., Path], tmp_path: Path) -> None:
    folder, precious = run(), tmp_path / "precious"
    (folder / OUTBOX).rename(precious)
    before = precious.read_bytes()
    (folder / OUTBOX).symlink_to(precious)
    assert sync(folder) == 2
    assert precious.read_bytes() == before


@pytest.mark.parametrize("entry", [Point("a=b", 1.0, 1, 1), Tag("../a", "b"), Tag("mlflow.runName", "b")])
def test_a_name_that_no_run_writes_is_refused(entry: Point | Tag, run: Callable[..., Path]) -> None:
    folder = run()
    with (folder / OUTBOX).open("a") as file:
        file.write(to_line(entry))
    assert sync(folder) == 2


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.yaml", None), ("config.yaml", "- a"), ("config.yaml", "tracking: {uri: 3}"),
        ("config.yaml", "tracking: {uri: mlruns}"), ("config.yaml", "a: !!python/object/apply:os.getcwd []"),
        ("config.yaml", "tracking: {uri: 'sqlite:///other.db'}"), (RUN_ID_FILE, "../x"), (RUN_ID_FILE, None),
        (RUN_ID_FILE, "0" * 32), (OUTBOX, None),
    ],
)  # fmt: skip
def test_a_folder_that_is_no_runs(
    name: str,
    content: str | None,
    run: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = run()
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    assert sync(folder) == 2
    assert capsys.readouterr().err.count("got: ") == 1
    assert not (tmp_path / "other.db").exists()


def test_sync_is_not_a_comparison(run: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = run()
    assert sync(folder, "--metric", "a") == 2
    assert "--sync with --uri alone" in capsys.readouterr().err
    assert undelivered(folder)


def test_a_new_mlflow_run_gets_everything(run: Callable[..., Path], uri: str) -> None:
    folder = run()
    (folder / RUN_ID_FILE).unlink()
    tracker = MLflowTracker(uri)
    tracker.start(folder, "a run", {"arm": "x"}, {})
    tracker.load_state_dict({"bytes": Outbox(folder, "").length, "clock": 0, "run_id": "other"})
    tracker.finish("finished")
    check_delivered(uri, folder)
