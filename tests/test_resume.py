"""Killed at any moment and resumed, a run ends as if nothing had happened: files, weights, points."""

from __future__ import annotations

import multiprocessing
import os
import random
import runpy
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock
from mlflow import MlflowClient

from cl_moe import checkpoint
from cl_moe.tracking import artifacts

DIGITS = ("hydra.run.dir=out", "trainer.epochs=1", "stream.tune_on_first=3", "trainer.log_every=4")
MOE = (
    *("layer=moe", "layer.hidden=16", "growth=every_experience", "growth.num_experts=4"),
    *("freeze=past_experts", "strategy=replay", "strategy.replay.memory_size=60"),
    *("optimizer=adamw", "optimizer.state=carry"),
)
PEER = (
    *("layer=peer", "layer.num_experts=64", "layer.k=4", "layer.heads=2", "strategy=lwf"),
    *("growth=every_experience", "growth.num_experts=16", "freeze=past_experts_and_router"),
)
ARMS = {
    "dense": (*DIGITS, "strategy=replay", "trainer.epochs=2"),
    "moe": (*DIGITS, *MOE),
    "peer": (*DIGITS, *PEER),
}
CHAOS = runpy.run_path(str(Path(__file__).with_name("chaos.py")))
start = CHAOS["start"]


@pytest.fixture(scope="session")
def server() -> multiprocessing.context.ForkServerContext:
    return CHAOS["forkserver"]()


@pytest.fixture(scope="module")
def reference(command_in: Callable, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder in which an arm ran undisturbed."""
    folders: dict[str, Path] = {}

    def folder(arm: str) -> Path:
        if arm not in folders:
            folders[arm] = tmp_path_factory.mktemp(arm)
            assert command_in(folders[arm], *ARMS[arm]).status == 0
        return folders[arm]

    return folder


def kill(server, ready_store: Path, folder: Path, arm: str, place: str, count: int) -> None:
    shutil.copy(ready_store, folder / "mlflow.db")
    process = start(server, folder, ARMS[arm], place, count)
    process.join(120)
    assert process.exitcode == -signal.SIGKILL, (folder / "log.txt").read_text()


def assert_same(one: Path, two: Path) -> None:
    assert CHAOS["differences"](CHAOS["facts"](one), CHAOS["facts"](two)) == []


MOMENTS = [
    ("moe", "within saving", 3),
    ("moe", "after sending", 2),  # sent, and not yet known to be sent
    ("peer", "before training", 20),
    *(
        pytest.param(*moment, marks=pytest.mark.slow)
        for moment in [
            ("dense", "before saving", 1),  # nothing saved: starts over
            ("dense", "before training", 30),  # in the second pass of the second experience
            ("dense", "before closing", 1),  # everything saved
            ("moe", "before growing", 3),
            ("moe", "after evaluating", 6),
            ("peer", "after saving", 2),
            ("peer", "before drawing", 1),
            ("dense", "within saving", 1),
            ("dense", "before sending", 1),
            ("dense", "after saving", 4),
        ]
    ),
]


@pytest.mark.parametrize(("arm", "place", "count"), MOMENTS, ids=lambda part: str(part))
def test_killed_and_resumed_is_as_if_never_killed(
    arm, place, count, server, ready_store, reference, command_in, tmp_path
):
    kill(server, ready_store, tmp_path, arm, place, count)
    before = checkpoint.newest(tmp_path / "out/checkpoints")
    done = command_in(tmp_path, "resume=out")
    assert done.status == 0, done.text
    assert ("resumed after experience" in done.text) == (before is not None)
    assert_same(tmp_path, reference(arm))
    assert not list((tmp_path / "out/checkpoints").glob(".*"))


STOPS = [
    ("moe", "before training", 12, signal.SIGTERM, 75, "after experience 1 of 3 and 3 batches of the next"),
    ("peer", "before training", 12, signal.SIGINT, 130, "after experience 1 of 3 and 3 batches of the next"),
    ("moe", "before training", 9, signal.SIGTERM, 75, "after experience 0 of 3 and 9 batches of the next"),
    ("moe", "before evaluating", 9, signal.SIGTERM, 75, "after experience 1 of 3 and 9 batches of the next"),
    ("moe", "before growing", 2, signal.SIGTERM, 75, "after experience 1 of 3"),
    ("dense", "before evaluating", 1, signal.SIGTERM, 75, ""),
]


@pytest.mark.parametrize(
    ("arm", "place", "count", "number", "status", "where"),
    [STOPS[0], *(pytest.param(*stop, marks=pytest.mark.slow) for stop in STOPS[1:])],
)
def test_stopped_on_request_keeps_the_step_it_was_at(
    arm, place, count, number, status, where, server, ready_store, reference, command_in, tmp_path
):
    shutil.copy(ready_store, tmp_path / "mlflow.db")
    process = start(server, tmp_path, ARMS[arm], place, count, number)
    process.join(120)
    said = (tmp_path / "log.txt").read_text()
    assert process.exitcode == status, said
    assert f"kept: the state {where}, in" in said if where else "kept: nothing" in said
    assert "Traceback" not in said
    done = command_in(tmp_path, "resume=out")
    assert done.status == 0, done.text
    assert f"resumed {where}\n" in done.text if where else "resumed" not in done.text
    assert_same(tmp_path, reference(arm))


def test_a_second_keyboard_interrupt_does_not_wait(server, ready_store, reference, command_in, tmp_path):
    shutil.copy(ready_store, tmp_path / "mlflow.db")
    process = start(server, tmp_path, ARMS["moe"], "around training", 12, signal.SIGINT)
    process.join(120)
    assert process.exitcode == 130, (tmp_path / "log.txt").read_text()
    assert not list(tmp_path.glob("out/checkpoints/*_batch_*"))
    assert command_in(tmp_path, "resume=out").status == 0
    assert_same(tmp_path, reference("moe"))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_killed_twice_at_random_steps(seed, server, ready_store, reference, command_in, tmp_path):
    draw = random.Random(seed)
    arm = draw.choice(list(ARMS))
    kill(server, ready_store, tmp_path, arm, "before training", draw.randint(1, 26))
    again = start(server, tmp_path, ("resume=out",), "before training", draw.randint(1, 26))
    again.join(120)
    assert again.exitcode in (0, -signal.SIGKILL)
    assert command_in(tmp_path, "resume=out").status == 0
    assert_same(tmp_path, reference(arm))


def test_killed_from_outside(server, ready_store, reference, command_in, tmp_path):
    shutil.copy(ready_store, tmp_path / "mlflow.db")
    process = start(server, tmp_path, ARMS["moe"], "never", 0)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("out/checkpoints/boundary_001-*")) and time.monotonic() < deadline:
        time.sleep(0.005)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert command_in(tmp_path, "resume=out", *ARMS["moe"][1:]).status == 0  # its own arguments are allowed
    assert_same(tmp_path, reference("moe"))


@pytest.fixture
def finished(reference: Callable[[str], Path], tmp_path: Path) -> Path:
    """A finished run in a folder of its own. Its store is the reference's, copied."""
    shutil.copytree(reference("moe"), tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_resuming_a_finished_run_doubles_nothing(finished, reference, command_in):
    for _ in range(2):
        done = command_in(finished, "resume=out")
        assert done.status == 0, done.text
    assert_same(finished, reference("moe"))
    scores = artifacts.read_matrix(finished / "out" / artifacts.MATRIX).scores
    assert done.objectives == pytest.approx([scores[-1].mean().item()])


def test_a_damaged_checkpoint_falls_back_to_the_one_before(finished, reference, command_in):
    newest = max((finished / "out/checkpoints").glob("boundary_*.pt"))
    newest.write_bytes(newest.read_bytes()[:-100])
    done = command_in(finished, "resume=out")
    assert done.status == 0, done.text
    assert "is damaged" in done.text
    assert_same(finished, reference("moe"))


def test_no_good_checkpoint_is_the_users_to_mend(finished, command_in):
    for file in (finished / "out/checkpoints").glob("boundary_*.pt"):
        file.write_bytes(b"")
    done = command_in(finished, "resume=out")
    assert done.status == 2
    assert done.text.count("got: ") == 1
    assert "none of them good" in done.text


def test_resume_by_run_id(reference, command_in):
    folder = reference("dense")
    run_id = (folder / "out/mlflow_run_id").read_text().strip()
    done = command_in(folder, f"resume={run_id}")
    assert done.status == 0, done.text
    assert "resumed after experience 3 of 3" in done.text


def test_other_arguments_beside_resume_are_refused(finished, command_in):
    before = CHAOS["points"](finished)
    for other in ("optimizer.lr=0.5", "trainer.epochs=2", "layer=dense"):
        done = command_in(finished, "resume=out", other)
        assert done.status == 2
        assert f"got: {other} beside resume" in done.text
        assert "growth=every_experience" in done.text  # what is allowed
    assert command_in(finished, "-m", "resume=out").status == 2
    assert CHAOS["points"](finished) == before


def test_a_folder_with_another_configuration_is_refused(finished, command_in):
    done = command_in(finished, *ARMS["moe"], "optimizer.lr=0.5")
    assert done.status == 2
    assert "optimizer.lr=0.5 in a run that began with" in done.text


def test_one_live_writer(finished, command_in):
    with FileLock(finished / "out/.lock"):
        done = command_in(finished, "resume=out")
    assert done.status == 2
    assert done.text.count("got: ") == 1
    assert "another process is writing" in done.text


def test_a_given_output_dir_can_be_resumed_from_elsewhere(command_in, tmp_path):
    words = ("output_dir=mine", "trainer.epochs=1", "stream.tune_on_first=1", "tracking=none")
    assert command_in(tmp_path, *words).status == 0
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = command_in(elsewhere, "resume=../mine")
    assert done.status == 0, done.text
    assert "resumed after experience 1 of 1" in done.text
    assert not (elsewhere / "mine").exists()


@pytest.mark.slow
def test_a_run_with_a_config_dir_of_its_own_resumes_alone(command_in, tmp_path):
    (tmp_path / "mine" / "optimizer").mkdir(parents=True)
    (tmp_path / "mine" / "optimizer" / "slow.yaml").write_text("_target_: cl_moe.optim.SGD\nlr: 0.01\n")
    words = ("optimizer=slow", "trainer.epochs=1", "stream.tune_on_first=1", "tracking=none")
    started = command_in(tmp_path, "--config-dir", "mine", *words, "hydra.run.dir=out")
    assert started.status == 0, started.text
    for again in (["resume=out"], ["--config-dir", "mine", "resume=out"]):
        done = command_in(tmp_path, *again)
        assert done.status == 0, done.text
        assert "resumed after experience 1 of 1" in done.text


@pytest.mark.slow
def test_a_job_of_a_multirun_can_be_resumed(command_in, tmp_path):
    words = ("trainer.epochs=1", "stream.tune_on_first=2", "hydra.sweep.dir=sweep", "seed.init=0,1")
    assert command_in(tmp_path, "-m", *words).status == 0
    matrix = tmp_path / "sweep/1" / artifacts.MATRIX
    before = matrix.read_bytes()
    for file in (tmp_path / "sweep/1/checkpoints").glob("boundary_002-*"):
        file.unlink()
    done = command_in(tmp_path, "resume=sweep/1")
    assert done.status == 0, done.text
    assert "resumed after experience 1 of 2" in done.text
    assert matrix.read_bytes() == before
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    found = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    found = [run for run in found if "sweep_parent" not in run.data.tags]
    assert len(found) == 2
    assert len({run.data.tags["sweep"] for run in found}) == 1
    assert {run.data.tags["sweep"] for run in found} != {"none"}
