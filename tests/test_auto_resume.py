"""The same command started again: the same run goes on, a sweep skips what is finished."""

from __future__ import annotations

import runpy
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from cl_moe.learner import Learner
from cl_moe.tracking import artifacts
from cl_moe.tracking.outbox import SENT

CHAOS = runpy.run_path(str(Path(__file__).with_name("chaos.py")))
SMALL = ("trainer.epochs=1", "stream.tune_on_first=2", "model.width=16", "layer=moe", "layer.hidden=8")
AGAIN = ("auto_resume=true", *SMALL)
SWEEP = ("-m", *SMALL, "seed.init=0,1,2")


pytestmark = pytest.mark.usefixtures("no_drawing")


@pytest.fixture
def killed(ready_store: Path, tmp_path: Path) -> Callable[..., None]:
    """``killed(place, count, *arguments)``: a command that dies in the count-th call of a place."""
    server = CHAOS["forkserver"]()

    def kill(place: str, count: int, *arguments: str) -> None:
        if not (tmp_path / "mlflow.db").exists():
            shutil.copy(ready_store, tmp_path / "mlflow.db")
        process = CHAOS["start"](server, tmp_path, arguments, place, count)
        process.join(120)
        assert process.exitcode == -signal.SIGKILL, (tmp_path / "log.txt").read_text()

    return kill


@pytest.fixture
def untrainable(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on nothing may train."""

    def refuse(self: Learner, *args: object) -> None:
        raise AssertionError("it trains")

    return lambda: monkeypatch.setattr(Learner, "training_step", refuse)


def runs(folder: Path) -> list[Run]:
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    found = client.search_runs([e.experiment_id for e in client.search_experiments()])
    return [run for run in found if "sweep_parent" not in run.data.tags]


def test_a_killed_command_goes_on_by_itself_and_says_when_it_is_finished(
    killed: Callable, command_in: Callable, tmp_path: Path, untrainable: Callable
):
    killed("before training", 9, *AGAIN)
    (folder,) = (tmp_path / "outputs").iterdir()
    (begun,) = runs(tmp_path)
    done = command_in(tmp_path, *AGAIN)
    assert done.status == 0, done.text
    assert "resumed after experience" in done.text
    assert [*(tmp_path / "outputs").iterdir()] == [folder]
    (ended,) = runs(tmp_path)
    assert (ended.info.run_id, ended.info.status) == (begun.info.run_id, "FINISHED")
    matrix = (folder / artifacts.MATRIX).read_bytes()
    assert command_in(tmp_path, *SMALL, "hydra.run.dir=plain", "tracking=none").status == 0
    assert matrix == (tmp_path / "plain" / artifacts.MATRIX).read_bytes()

    untrainable()
    again = command_in(tmp_path, *AGAIN)
    assert (again.status, again.objectives) == (0, done.objectives)
    assert again.text.splitlines() == [
        f"the run is finished: stream/average_accuracy = {done.objectives[0]:.6g}, in {folder}"
    ]


@pytest.mark.slow
def test_a_given_folder_is_met_again(command_in: Callable, tmp_path: Path):
    words = (*AGAIN, "tracking=none", "output_dir=mine")
    first, second = command_in(tmp_path, *words), command_in(tmp_path, *words)
    assert (first.status, second.status) == (0, 0)
    assert second.objectives == first.objectives
    assert "the run is finished" in second.text
    other = command_in(tmp_path, *words, "optimizer.lr=0.3")
    assert other.status == 2
    assert "optimizer.lr=0.3 in a run that began with" in other.text
    survives_otherwise = command_in(tmp_path, *words, "checkpoint.keep=7")
    assert survives_otherwise.status == 0, survives_otherwise.text
    explicit = command_in(tmp_path, "resume=mine")  # goes all the way once more
    assert "the run is finished" not in explicit.text
    assert "resumed after experience 2 of 2" in explicit.text


@pytest.mark.slow
def test_without_auto_resume_a_finished_run_is_gone_through_again(command_in: Callable, tmp_path: Path):
    words = (*SMALL, "tracking=none", "hydra.run.dir=out")
    assert command_in(tmp_path, *words).status == 0
    again = command_in(tmp_path, *words)
    assert again.status == 0, again.text
    assert "resumed after experience 2 of 2" in again.text


def test_auto_resume_comes_from_the_command_line(command_in: Callable, tmp_path: Path):
    (tmp_path / "mine/experiment").mkdir(parents=True)
    (tmp_path / "mine/experiment/again.yaml").write_text("# @package _global_\nauto_resume: true\n")
    words = ("--config-dir", "mine", "experiment=again", *SMALL, "tracking=none")
    done = command_in(tmp_path, *words)
    assert (done.status, done.text.count("change: auto_resume")) == (2, 1)
    assert not (tmp_path / "outputs").exists()
    assert command_in(tmp_path, *words, "auto_resume=false").status == 0


@pytest.mark.parametrize(
    ("begin", "again"),
    [
        pytest.param(*((*SWEEP, "hydra.sweep.dir=sweep"),) * 2, marks=pytest.mark.slow),
        pytest.param((*SWEEP, "hydra.sweep.dir=sweep"), ("resume=sweep",), marks=pytest.mark.slow),
        ((*SWEEP, "auto_resume=true"), (*SWEEP, "auto_resume=true")),
    ],
    ids=["same folder", "resume", "auto_resume"],
)
def test_a_sweep_started_again_skips_its_finished_jobs(
    begin: tuple[str, ...],
    again: tuple[str, ...],
    killed: Callable,
    command_in: Callable,
    tmp_path: Path,
    untrainable: Callable,
):
    killed("before closing", 2, *begin)
    (sweep,) = [path.parent for path in tmp_path.glob("**/multirun.yaml")]
    first = {run.info.run_id: run.info.end_time for run in runs(tmp_path)}
    done = command_in(tmp_path, *again)
    assert done.status == 0, done.text
    assert len(done.objectives) == 3
    assert "job 0 (" in done.text
    assert done.text.count(" is finished: stream/average_accuracy = ") == 1
    assert "seed.init=0" in next(line for line in done.text.splitlines() if "is finished" in line)
    assert done.text.count("resumed after experience 2 of 2") == 1
    found = runs(tmp_path)
    assert [run.info.status for run in found] == ["FINISHED"] * 3
    assert {run.data.tags["sweep"] for run in found} == {str(sweep.relative_to(tmp_path))}
    ended = {run.info.run_id: run.info.end_time for run in found}
    assert len([run_id for run_id in first if first[run_id] and first[run_id] == ended[run_id]]) == 1

    untrainable()
    whole = command_in(tmp_path, *again)
    assert (whole.status, whole.objectives) == (0, done.objectives)
    assert whole.text.count(" is finished: ") == 3
    assert "resumed" not in whole.text


@pytest.mark.slow
def test_a_finished_job_that_was_not_delivered_is_not_skipped(command_in: Callable, tmp_path: Path):
    words = ("-m", *SMALL, "hydra.sweep.dir=sweep", "seed.init=0,1")
    assert command_in(tmp_path, *words).status == 0
    (tmp_path / "sweep/1" / SENT).unlink()
    done = command_in(tmp_path, *words)
    assert (done.status, done.text.count(" is finished: ")) == (0, 1)
    assert done.text.count("resumed after experience 2 of 2") == 1
    assert (tmp_path / "sweep/1" / SENT).exists()
    assert command_in(tmp_path, *words).text.count(" is finished: ") == 2


def test_a_sweep_over_other_values_is_another_sweep(command_in: Callable, tmp_path: Path):
    words = ("-m", *SMALL, "tracking=none", "hydra.sweep.dir=sweep")
    assert command_in(tmp_path, *words, "seed.init=0").status == 0
    other = command_in(tmp_path, *words, "seed.init=5")
    assert other.status == 2
    assert "seed.init=5 in a run that began with 0" in other.text


@pytest.mark.parametrize(
    "content",
    [
        "value: many\nobjective: stream/average_accuracy\n",
        *(
            pytest.param(text, marks=pytest.mark.slow)
            for text in ("", "objective: x\nvalue: 1.0\n", "[1]", "a: [")
        ),
    ],
)
def test_a_mark_that_is_none_is_passed_over(content: str, command_in: Callable, tmp_path: Path):
    words = (*AGAIN, "tracking=none")
    first = command_in(tmp_path, *words)
    (mark,) = tmp_path.glob("outputs/*/finished.yaml")
    mark.write_text(content)
    again = command_in(tmp_path, *words)
    assert (again.status, again.objectives) == (0, first.objectives)
    assert "resumed after experience 2 of 2" in again.text


def test_what_was_refused_leaves_no_folder_and_takes_none(command_in: Callable, tmp_path: Path):
    assert command_in(tmp_path, *SMALL, "tracking=none", "optimizer.lr=-1").status == 2
    assert not (tmp_path / "outputs").exists()
    words = (*SMALL, "tracking=none", "hydra.run.dir=out")
    assert command_in(tmp_path, *words, "optimizer.lr=-1").status == 2
    mended = command_in(tmp_path, *words, "optimizer.lr=0.1")
    assert mended.status == 0, mended.text
