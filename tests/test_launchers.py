"""Sweeps whose jobs other processes run, by joblib, submitit and ray, and searches by optuna."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import Run
from omegaconf import OmegaConf

import conf
from cl_moe import checkpoint, stopping, sweeping
from cl_moe.errors import InputError, JobStoppedError, StopRequestedError

SMALL = ("trainer.epochs=1", "stream.tune_on_first=2", "eval.samples=0", "layer=moe", "layer.hidden=16")
PATIENCE = 1800.0
ROOT = Path(conf.__path__[0]) / "hydra"
OPTIONS = sorted((path.parent.name, path.stem) for path in ROOT.glob("*/*.yaml"))
# optuna 2.10, which Hydra's sweeper wants, asks SQLAlchemy for a name that moved
OLD_OPTUNA = pytest.mark.filterwarnings("ignore:The ``declarative_base")


def needs(extra: str) -> pytest.MarkDecorator:
    """Skips, by the extra's name, what cannot run without it."""
    package = {"optuna": "hydra-optuna-sweeper"}.get(extra, f"hydra-{extra}-launcher")
    there = False
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        there = bool(importlib.metadata.version(package))
    return pytest.mark.skipif(not there, reason=f"needs pip install 'cl-moe[{extra}]'")


NEEDED = {
    launcher: needs(extra)
    for launcher, (extra, _) in {
        **sweeping.PLUGINS["hydra/launcher"],
        **sweeping.PLUGINS["hydra/sweeper"],
    }.items()
}


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "cl_moe", *arguments]
    return subprocess.Popen(words, cwd=folder, text=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE)


def run(folder: Path, *arguments: str) -> tuple[int, str]:
    process = start(folder, *arguments)
    try:
        said = "".join(process.communicate(timeout=PATIENCE))
    finally:
        process.kill()
    return process.returncode, said


def until(true: Callable[[], object]) -> None:
    pause = threading.Event()
    for _ in range(int(PATIENCE / 0.1)):
        if true():
            return
        pause.wait(0.1)
    raise AssertionError("it never became true")


def jobs_and_parents(folder: Path) -> tuple[list[Run], list[Run]]:
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    found = client.search_runs([client.get_experiment_by_name("cl-moe").experiment_id])
    return [r for r in found if "sweep" in r.data.tags], [r for r in found if "sweep_parent" in r.data.tags]


def check_points_stand_once(folder: Path, jobs: list[Run]) -> None:
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    for job in jobs:
        for key in job.data.metrics:
            steps = [point.step for point in client.get_metric_history(job.info.run_id, key)]
            assert len(set(steps)) == len(steps), key


@pytest.mark.parametrize(("group", "name"), [(g, n) for g, names in sweeping.PLUGINS.items() for n in names])
def test_what_is_not_installed_is_refused_with_the_extra_that_brings_it(monkeypatch, group, name):
    monkeypatch.setattr(sweeping, "find_spec", lambda module: None)
    with pytest.raises(InputError, match=rf"got: {group}={name}.*\n.*pip install .*'cl-moe\[\w+\]'"):
        sweeping.check(["-m", f"{group}={name}", "seed.init=0,1"])


def test_a_launcher_without_a_sweep_and_a_storage_that_cannot_be_are_refused(command, monkeypatch):
    monkeypatch.setattr(sweeping, "find_spec", lambda module: object())
    refused = command("hydra/launcher=joblib", "layer=moe")
    assert (refused.status, "beside -m" in refused.text) == (2, True)
    refused = command("-m", "hydra/sweeper=optuna", "hydra.sweeper.storage=sqlite:///a.db", "seed.init=0,1")
    assert (refused.status, "change: hydra.sweeper.storage" in refused.text) == (2, True)


def test_the_optuna_sweeper_is_told_what_its_defaults_get_wrong():
    told = sweeping.completed(["-m", "hydra/sweeper=optuna", "optimizer.lr=interval(0,1)"])
    assert told[3:] == ["hydra.sweeper.direction=maximize", "hydra.sweeper.sampler.seed=0"]
    own = ["-m", "hydra/sweeper=optuna", "hydra/sweeper/sampler=grid", "hydra.sweeper.direction=minimize"]
    assert sweeping.completed(own) == own
    assert sweeping.completed(["-m", "hydra/sweeper=search"]) == ["-m", "hydra/sweeper=search"]


@pytest.mark.parametrize(
    ("group", "name"), [pytest.param(g, n, marks=NEEDED[n]) for g, n in OPTIONS], ids=lambda word: word
)
def test_every_option_composes_and_opens_with_how_to_run_it(command, group, name):
    assert (ROOT / group / f"{name}.yaml").read_text().startswith(f"# cl-moe -m hydra/{group}={name} ")
    shown = command(f"hydra/{group}={name}", "--cfg", "hydra", "-p", f"hydra.{group}")
    assert shown.status == 0, shown.text
    own = OmegaConf.load(ROOT / group / f"{name}.yaml")
    composed = OmegaConf.create(shown.text)
    assert OmegaConf.merge(composed, {k: v for k, v in own.items() if k != "defaults"}) == composed


def test_a_request_to_stop_comes_through_a_job_as_an_error_and_is_one_again():
    import pickle

    stop = pickle.loads(pickle.dumps(JobStoppedError("kept: all", keyboard=True)))
    assert isinstance(stop, StopRequestedError)
    assert (str(stop), stop.keyboard) == ("kept: all", True)


def test_a_job_elsewhere_hears_once_and_no_further_job_begins(tmp_path, monkeypatch):
    monkeypatch.setattr(stopping, "_noted", None)
    monkeypatch.setenv(sweeping.JOBS, f"{os.getppid()}:{tmp_path}")
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with sweeping.noted(), stopping.working(), stopping.deferring():
            assert sweeping._tell(tmp_path, signal.SIGTERM)
            assert stopping.asked()
            os.kill(os.getpid(), signal.SIGINT)  # Ctrl-C reaches a terminal's processes, too: not twice
        assert not list(tmp_path.glob("pid_*"))
        with pytest.raises(StopRequestedError), stopping.working():
            stopping.obey()
        monkeypatch.setattr(stopping, "_noted", None)  # another process, which begins late
        with sweeping.noted():
            assert stopping.wish() == stopping.STOP
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.slow
@NEEDED["joblib"]
def test_eight_jobs_of_joblib_on_a_fresh_store_lose_nothing_and_have_the_bits_of_one(tmp_path, command_in):
    status, said = run(
        tmp_path, "-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=4", "seed.init=range(8)", *SMALL
    )
    assert status == 0, said
    jobs, parents = jobs_and_parents(tmp_path)
    assert (len(jobs), len(parents)) == (8, 1)
    assert {job.info.status for job in [*jobs, *parents]} == {"FINISHED"}
    assert {job.data.tags["mlflow.parentRunId"] for job in jobs} == {parents[0].info.run_id}
    assert sorted(job.data.tags["seed.init"] for job in jobs) == list("01234567")
    check_points_stand_once(tmp_path, jobs)
    (tmp_path / "alone").mkdir()
    alone = command_in(tmp_path / "alone", "seed.init=5", *SMALL, "output_dir=out")
    assert alone.status == 0, alone.text
    (job,) = tmp_path.glob("multirun/*/*/5/accuracy_matrix.csv")
    assert job.read_bytes() == (tmp_path / "alone/out/accuracy_matrix.csv").read_bytes()  # the same threads


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher", [pytest.param(name, marks=NEEDED[name]) for name in ("joblib", "submitit_local", "ray")]
)
def test_every_job_uses_as_many_processes_as_it_says(tmp_path, launcher):
    words = ("trainer=ddp", "trainer.devices=1,2", "checkpoint.keep=1", *SMALL)
    status, said = run(tmp_path, "-m", f"hydra/launcher={launcher}", *words)
    assert status == 0, said
    one, two = sorted(jobs_and_parents(tmp_path)[0], key=lambda job: job.data.tags["world_size"])
    assert [job.data.tags["world_size"] for job in (one, two)] == ["1", "2"]
    for key in ("cost/examples_seen", "cost/train_flops"):  # two processes at half of the work, not twice it
        assert one.data.metrics[key] == two.data.metrics[key]
    states = [checkpoint.newest(Path(job.data.tags["output_dir"]) / "checkpoints") for job in (one, two)]
    assert all(state is not None for state in states)
    assert [len(state.get("ranks", ["alone"])) for state in states if state] == [1, 2]
    models = [state["learner"]["model"] for state in states if state]
    for name, value in models[0].items():
        assert torch.allclose(value.double(), models[1][name].double(), atol=1e-5), name
    check_points_stand_once(tmp_path, [one, two])


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [pytest.param(n, marks=NEEDED[n]) for n in ("joblib", "submitit_local")])
def test_a_job_that_fails_is_told_with_its_status_and_the_others_end(tmp_path, launcher):
    words = ("-m", f"hydra/launcher={launcher}", "layer.num_experts=4,0,8", "hydra.sweep.dir=sweep")
    status, said = run(tmp_path, *words, *SMALL, "tracking=none")
    assert status == 2, said
    assert said.count("change: layer.num_experts") == 1
    assert "Traceback" not in said
    assert [path.parent.name for path in sorted(tmp_path.glob("sweep/*/finished.yaml"))] == ["0", "2"]


LONG = ("checkpoint.every_steps=20", "hydra.sweep.dir=sweep", "seed.init=0,1")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "devices", "epochs"),
    [
        pytest.param("joblib", 1, 300, marks=NEEDED["joblib"]),
        pytest.param("submitit_local", 2, 60, marks=NEEDED["submitit_local"]),
    ],
)
def test_a_sweep_that_was_stopped_goes_on(tmp_path, launcher, devices, epochs):
    words = (f"hydra/launcher={launcher}", "trainer=ddp", f"trainer.devices={devices}", *SMALL, *LONG)
    words = (
        *words,
        f"trainer.epochs={epochs}",
        *(["hydra.launcher.n_jobs=2"] if launcher == "joblib" else []),
    )
    sweep = start(tmp_path, "-m", *words)
    inside = "checkpoints/boundary_000_batch*"
    until(lambda: all(list(tmp_path.glob(f"sweep/{job}/{inside}")) for job in (0, 1)))
    sweep.send_signal(signal.SIGTERM)
    said = "".join(sweep.communicate(timeout=PATIENCE))
    assert sweep.returncode == 75, said
    assert "go on: cl-moe resume=" in said
    assert "Traceback" not in said
    assert "kept: the state after experience 0 of 2 and" in said
    status, said = run(tmp_path, "resume=sweep", "checkpoint.every_steps=null")
    assert status == 0, said
    jobs, parents = jobs_and_parents(tmp_path)
    assert (len(jobs), len(parents)) == (2, 1)
    assert {job.info.status for job in [*jobs, *parents]} == {"FINISHED"}
    check_points_stand_once(tmp_path, jobs)


@pytest.mark.slow
@NEEDED["submitit_local"]
def test_a_job_that_the_queue_wants_back_saves_and_goes_on_by_itself(tmp_path):
    """Submitit's warning, as SLURM sends it before a job's time is over, or for another job's sake."""
    words = ("-m", "hydra/launcher=slurm_rehearsal", *SMALL, *LONG, "trainer.epochs=300", "seed.init=0")
    sweep = start(tmp_path, *words, "tracking=none")
    until(lambda: list(tmp_path.glob("sweep/0/checkpoints/boundary_000_batch*")))
    jobs = subprocess.run(["ps", "-wweo", "pid,args"], capture_output=True, text=True).stdout.splitlines()
    (job,) = [
        int(line.split()[0]) for line in jobs if "submitit.core._submit" in line and str(tmp_path) in line
    ]
    os.kill(job, signal.SIGUSR2)
    said = "".join(sweep.communicate(timeout=PATIENCE))
    assert sweep.returncode == 0, said
    assert (tmp_path / "sweep/0/finished.yaml").exists()
    logs = "".join(path.read_text() for path in tmp_path.glob("sweep/.submitit/**/*_log.*"))
    assert "Requeued job" in logs
    assert "resumed after experience 0 of 2 and" in logs


@pytest.mark.slow
@NEEDED["optuna"]
@OLD_OPTUNA
def test_a_search_finds_the_best_objective_and_started_again_trains_nothing(tmp_path, command_in):
    words = ("hydra/sweeper=optuna", "hydra.sweeper.n_trials=4", "optimizer.lr=tag(log,interval(0.001,1))")
    first = command_in(tmp_path, "-m", *words, *SMALL, "hydra.sweep.dir=sweep", "tracking=none")
    assert first.status == 0, first.text
    assert len(set(first.objectives)) > 1
    result = OmegaConf.load(tmp_path / "sweep/optimization_results.yaml")
    assert result.best_value == max(first.objectives)
    again = command_in(tmp_path, "resume=sweep")
    assert again.status == 0, again.text
    assert again.text.count("is finished: stream/average_accuracy") == 4
    assert OmegaConf.load(tmp_path / "sweep/optimization_results.yaml") == result


@pytest.mark.slow
@NEEDED["optuna"]
@OLD_OPTUNA
def test_a_search_of_which_every_trial_fails_says_so(tmp_path, command_in):
    words = ("hydra/sweeper=search", "hydra.sweeper.n_trials=2", "layer.num_experts=choice(0,-1)")
    ended = command_in(tmp_path, "-m", *words, *SMALL, "tracking=none")
    assert ended.status == 1
    assert "no trial of the search" in ended.text
    assert "defect" not in ended.text


@pytest.mark.slow
@NEEDED["ray"]
def test_jobs_on_a_ray_of_their_own(tmp_path):
    status, said = run(tmp_path, "-m", "hydra/launcher=ray_cluster", "seed.init=0,1", *SMALL)
    assert status == 0, said
    jobs, parents = jobs_and_parents(tmp_path)
    assert (len(jobs), len(parents)) == (2, 1)
    assert {job.info.status for job in [*jobs, *parents]} == {"FINISHED"}
    check_points_stand_once(tmp_path, jobs)
