"""The runs of a sweep stand below one parent in MLflow; each arm of an experiment has a colour of its own."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from cl_moe.tracking import figures, store, sweeps
from cl_moe.tracking.colours import COLOUR, colour
from cl_moe.tracking.tracker import MLflowTracker

SMALL = ("trainer.epochs=1", "stream.tune_on_first=2", "model.width=16", "hydra.sweep.dir=sweep")


def job(uri: str, sweep: Path, number: int, arm: str = "naive", **tags: str) -> MLflowTracker:
    folder = sweep / str(number)
    folder.mkdir(parents=True, exist_ok=True)
    tracker = MLflowTracker(uri)
    tracker.start(folder, f"{arm} {number}", {"arm": arm}, {"sweep": "the sweep", **tags}, sweep)
    return tracker


def all_runs(uri: str) -> list[Run]:
    client = store.open_store(uri)
    return list(client.search_runs([one.experiment_id for one in client.search_experiments()]))


def parents(uri: str) -> list[Run]:
    return [run for run in all_runs(uri) if sweeps.SWEEP_PARENT in run.data.tags]


def status(uri: str) -> str:
    (parent,) = parents(uri)
    return str(parent.info.status)


def test_the_jobs_of_a_sweep_have_one_parent_that_looks_like_no_job(uri: str, tmp_path: Path) -> None:
    jobs = [job(uri, tmp_path / "sweep", number) for number in range(3)]
    (parent,) = parents(uri)
    children = [run for run in all_runs(uri) if run.data.tags.get(sweeps.PARENT) == parent.info.run_id]
    assert {run.info.run_id for run in children} == {one.run_id for one in jobs}
    assert parent.info.run_name == "the sweep"
    assert (parent.data.params, parent.data.metrics) == ({}, {})
    assert "sweep" not in parent.data.tags
    assert {run.data.tags["sweep"] for run in children} == {"the sweep"}


def test_jobs_that_start_together_make_one_parent(uri: str, tmp_path: Path) -> None:
    errors: list[BaseException] = []

    def begin(number: int) -> None:
        try:
            job(uri, tmp_path / "sweep", number, arm=f"arm {number % 4}")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=begin, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(parents(uri)) == 1
    assert len(all_runs(uri)) == 9


def test_the_parent_has_the_state_of_its_jobs(uri: str, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    first, second = job(uri, sweep, 0), job(uri, sweep, 1)
    first.finish("finished")
    assert status(uri) == "RUNNING"
    second.finish("failed")
    assert status(uri) == "FAILED"
    again = job(uri, sweep, 1)  # it is resumed
    assert status(uri) == "RUNNING"
    again.finish("finished")
    assert status(uri) == "FINISHED"
    job(uri, sweep, 2).finish("stopped")
    assert status(uri) == "KILLED"
    assert len(parents(uri)) == 1


def test_a_job_that_is_resumed_alone_comes_back_to_its_parent(uri: str, tmp_path: Path) -> None:
    first = job(uri, tmp_path / "sweep", 0)
    first.finish("stopped")
    alone = MLflowTracker(uri)
    alone.start(tmp_path / "sweep" / "0", "a run", {"arm": "naive"}, {"sweep": "none"})  # no job any more
    assert status(uri) == "RUNNING"
    alone.finish("finished")
    assert status(uri) == "FINISHED"
    assert len(all_runs(uri)) == 2


def test_a_job_delivered_later_settles_its_sweep(uri: str, tmp_path: Path) -> None:
    from cl_moe.tracking.sync import Syncer

    tracker, database = job(uri, tmp_path / "sweep", 0), tmp_path / "mlflow.db"
    database.rename(tmp_path / "away.db")
    tracker.finish("finished")
    (tmp_path / "away.db").rename(database)
    assert status(uri) == "RUNNING"
    Syncer(uri).sync(tmp_path / "sweep" / "0")
    assert status(uri) == "FINISHED"


@pytest.mark.parametrize("where", ["before MLflow has it", "after"])
def test_a_kill_while_the_parent_is_made_leaves_no_second_one(
    where: str, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = MlflowClient.create_run

    def die(self: MlflowClient, *args: object, **options: object) -> None:
        if where == "after":
            make(self, *args, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "create_run", die)
        with pytest.raises(KeyboardInterrupt):
            job(uri, tmp_path / "sweep", 0)
    job(uri, tmp_path / "sweep", 0)
    assert len(parents(uri)) == 1
    assert len(all_runs(uri)) == 2


def test_a_branch_keeps_its_own_parent_and_a_run_alone_has_none(uri: str, tmp_path: Path) -> None:
    alone = MLflowTracker(uri)
    (tmp_path / "alone").mkdir()
    alone.start(tmp_path / "alone", "a run", {}, {})
    branch = job(uri, tmp_path / "sweep", 0, **{sweeps.PARENT: alone.run_id})
    assert parents(uri) == []
    assert branch.client.get_run(branch.run_id).data.tags[sweeps.PARENT] == alone.run_id
    branch.finish("finished")
    assert alone.client.get_run(alone.run_id).info.status == "RUNNING", "it is none of a sweep's"
    assert sweeps.PARENT not in alone.client.get_run(alone.run_id).data.tags


def test_another_store_or_experiment_gets_a_parent_of_its_own(uri: str, tmp_path: Path) -> None:
    job(uri, tmp_path / "sweep", 0)
    tracker = MLflowTracker(uri, "another")
    (tmp_path / "sweep" / "1").mkdir()
    tracker.start(tmp_path / "sweep" / "1", "a run", {"arm": "naive"}, {}, tmp_path / "sweep")
    assert len({run.info.experiment_id for run in parents(uri)}) == 2


def test_a_damaged_token_is_replaced(uri: str, tmp_path: Path) -> None:
    (tmp_path / "sweep").mkdir()
    (tmp_path / "elsewhere").write_text("' OR 1=1")
    (tmp_path / "sweep" / sweeps.TOKEN_FILE).symlink_to(tmp_path / "elsewhere")
    job(uri, tmp_path / "sweep", 0)
    assert len(parents(uri)) == 1
    assert (tmp_path / "elsewhere").read_text() == "' OR 1=1"


def colours_of(uri: str) -> dict[str, set[str]]:
    """``{arm: the colours of its runs}``."""
    found: dict[str, set[str]] = {}
    for run in all_runs(uri):
        if sweeps.SWEEP_PARENT not in run.data.tags:
            found.setdefault(run.data.params["arm"], set()).add(run.data.tags[COLOUR])
    return found


def test_thirteen_arms_have_thirteen_colours_the_same_over_seeds_and_sweeps(uri: str, tmp_path: Path) -> None:
    arms = [f"arm {number}" for number in range(13)]
    for number in range(17):
        job(uri, tmp_path / ("sweep" if number < 9 else "another"), number, arm=arms[number % 13])
    (tmp_path / "alone").mkdir()
    alone = MLflowTracker(uri)
    alone.start(tmp_path / "alone", "a run", {"arm": "arm 5"}, {})
    found = colours_of(uri)
    assert all(len(colours) == 1 for colours in found.values())
    assert len(set.union(*found.values())) == 13
    assert found["arm 0"] == {colour("arm 0")}, "the first has the colour that it has alone"
    for number in range(14):
        job(uri, tmp_path / "third", number, arm=f"late arm {number}")
    late = [*set.union(*(colours for arm, colours in colours_of(uri).items() if arm.startswith("late")))]
    assert len(late) == 13, "where an experiment has used up all, the arms of a sweep still differ"
    assert colours_of(uri)["late arm 13"] == {colour("late arm 13")}


def test_the_prepared_views_are_grouped_by_arm_and_left_alone(uri: str, tmp_path: Path) -> None:
    client = job(uri, tmp_path / "sweep", 0).client
    (experiment,) = [one for one in client.search_experiments() if one.name == "cl-moe"]
    for name, means in {"arms": True, "runs": False}.items():
        view = json.loads(experiment.tags[f"mlflow.sharedViewState.{name}"])
        assert view["groupBy"]["groupByKeys"] == [{"mode": "param", "groupByData": "arm"}]
        assert view["useGroupedValuesInCharts"] is means
    client.set_experiment_tag(experiment.experiment_id, "mlflow.sharedViewState.arms", "mine")
    job(uri, tmp_path / "sweep", 1)
    assert client.get_experiment(experiment.experiment_id).tags["mlflow.sharedViewState.arms"] == "mine"


@pytest.mark.slow
def test_a_sweep_of_the_command_line(
    command: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "write_figures", lambda record, folder: [])
    words = ("-m", *SMALL, "layer=dense,moe", "layer.hidden=8", "seed.init=0,1")
    done = command(*words)
    assert done.status == 0, done.text
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    (parent,) = parents(uri)
    jobs = [run for run in all_runs(uri) if run.data.tags.get(sweeps.PARENT) == parent.info.run_id]
    assert len(jobs) == 4
    assert (parent.info.status, parent.info.run_name) == ("FINISHED", "sweep")
    assert len({(run.data.params["arm"], run.data.tags[COLOUR]) for run in jobs}) == 2
    assert command(*words).status == 0, "all are finished"
    assert len(all_runs(uri)) == 5
    assert status(uri) == "FINISHED"
