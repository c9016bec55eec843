"""Several processes by the command that a user types, and how they end."""

from __future__ import annotations

import contextlib
import importlib.util
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

from cl_moe import checkpoint, ranks, worker
from cl_moe.engines import DDP
from cl_moe.errors import InputError, RunFailedError, StopRequestedError
from cl_moe.torchrun import DIED
from cl_moe.trainer import TrainerSpec

SMALL = ("trainer.epochs=1", "stream.tune_on_first=2", "eval.samples=0", "layer=moe", "layer.hidden=16")
GROWN = ("growth=every_experience", "growth.num_experts=4", "freeze=past_experts")
LONG = (*SMALL, *GROWN, "tracking=none", "trainer.epochs=400", "output_dir=out")
ENGINES = [
    pytest.param("ddp", id="ddp"),
    pytest.param("fsdp", id="fsdp"),
    pytest.param(
        "deepspeed",
        id="deepspeed",
        marks=pytest.mark.skipif(
            importlib.util.find_spec("deepspeed") is None, reason="the extra deepspeed is absent"
        ),
    ),
]
PATIENCE = 300.0


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine",
    [
        ENGINES[0],
        *(pytest.param(*e.values, id=e.id, marks=[*e.marks, pytest.mark.slow]) for e in ENGINES[1:]),
    ],
)
def test_each_job_of_a_sweep_uses_as_many_processes_as_it_says(command, tmp_path, engine):
    ended = command("-m", f"trainer={engine}", "trainer.devices=1,2", *SMALL, *GROWN)
    assert ended.status == 0, ended.text
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("cl-moe")
    runs = [r for r in client.search_runs([experiment.experiment_id]) if "world_size" in r.data.tags]
    one, two = sorted(runs, key=lambda run: run.data.tags["world_size"])
    assert [run.data.tags["world_size"] for run in (one, two)] == ["1", "2"]
    assert [run.info.status for run in (one, two)] == ["FINISHED", "FINISHED"]
    for key in one.data.metrics.keys() | two.data.metrics.keys():
        steps = [[p.step for p in client.get_metric_history(r.info.run_id, key)] for r in (one, two)]
        assert steps[0] == steps[1], key
        assert len(set(steps[0])) == len(steps[0]), "no step twice"
    # each rank counts what it computed itself: together no more than one process
    for key in ("cost/train_flops", "cost/examples_seen", "growth/num_experts"):
        assert one.data.metrics[key] == two.data.metrics[key]
    assert one.data.metrics["stream/average_accuracy"] == pytest.approx(ended.objectives[0], abs=1e-3)
    assert ended.objectives[0] == pytest.approx(ended.objectives[1], abs=0.05)


@pytest.mark.slow
def test_what_the_ranks_refuse_is_said_once_and_leaves_nothing(command, tmp_path):
    ended = command("trainer=ddp", "layer=moe", "layer.num_experts=0", "tracking=none")
    assert ended.status == 2
    assert ended.text.count("change: layer.num_experts") == 1
    assert not list(tmp_path.glob("outputs/*"))


ENDS = {
    "input": {"kind": "input", "got": "a", "allowed": "b", "key": "model", "trace": ""},
    "failed": {"kind": "failed", "message": "it broke", "trace": ""},
    "killed": None,
}


@pytest.mark.parametrize("said", ["", "stopped on request\nkept: what rank 0 could not write"])
@pytest.mark.parametrize("how", ENDS)
def test_what_ends_a_rank_is_what_the_run_ended_by_though_others_stopped(tmp_path, how, said):
    """Torchrun asks them to, which nobody else did; or they counted on what the other one was to save."""
    worker.note(tmp_path, 1, {"kind": "stopped", "message": said, "keyboard": False})
    spec = TrainerSpec(devices=2, accelerator="cpu", engine=DDP())
    with pytest.raises(StopRequestedError):
        ranks._value(tmp_path, spec)
    if outcome := ENDS[how]:
        worker.note(tmp_path, 0, outcome)
    else:
        (tmp_path / DIED).write_text('{"0": -9}')
    with pytest.raises((InputError, RunFailedError), match=r"change: model|it broke|rank 0 of 2 was killed"):
        ranks._value(tmp_path, spec)


def start(folder: Path, *arguments: str, engine: str = "ddp") -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "cl_moe", *LONG, f"trainer={engine}", *arguments]
    return subprocess.Popen(words, cwd=folder, text=True, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)


def until(true: Callable[[], object]) -> None:
    """Look again and again, as long as a busy machine may need."""
    pause = threading.Event()
    for _ in range(int(PATIENCE / 0.1)):
        if true():
            return
        pause.wait(0.1)
    raise AssertionError("it never became true")


def training(folder: Path) -> list[int]:
    """Process ids of the two ranks, once they have trained for a while."""
    until(lambda: list(folder.glob("out/checkpoints/boundary_000_batch*")))
    return [int(path.read_text()) for path in sorted(folder.glob("out/.ranks-*/pid_*"))]


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        state = Path(f"/proc/{pid}/stat").read_text() if Path("/proc").is_dir() else ""
        if " Z " in state:  # ended, and nobody has asked how
            return False
        os.kill(pid, 0)
        return True
    return False


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_a_rank_that_is_killed_ends_the_run_by_name(tmp_path, engine):
    process = start(tmp_path, "checkpoint.every_steps=5", engine=engine)
    ranks = training(tmp_path)
    os.kill(ranks[1], signal.SIGKILL)
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert "rank 1 of 2 was killed by SIGKILL" in said
    assert "kept: the state after experience 0 of 2 and" in said
    assert "Traceback" not in said
    until(lambda: not any(map(alive, ranks)))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_ranks_end_with_their_parent(tmp_path, engine):
    process = start(tmp_path, "checkpoint.every_steps=5", engine=engine)
    ranks = training(tmp_path)
    process.kill()
    process.communicate(timeout=PATIENCE)
    until(lambda: not any(map(alive, ranks)))


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_stopped_run_goes_on_where_it_stopped_with_other_processes_too(tmp_path, number, status):
    process = start(tmp_path, "checkpoint.every_steps=5", "checkpoint.every_minutes=null")
    training(tmp_path)
    process.send_signal(number)
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == status, said
    assert "kept: the state after experience" in said
    state = checkpoint.newest(tmp_path / "out" / "checkpoints")
    assert state is not None
    assert len(state["ranks"]) == 2
    assert not list(tmp_path.glob("out/.ranks-*"))
    again = [sys.executable, "-m", "cl_moe", "resume=out", "trainer.devices=1", "checkpoint.every_steps=1"]
    one = subprocess.Popen(again, cwd=tmp_path, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    before = state["batches"]
    newest = tmp_path / "out" / "checkpoints"
    until(
        lambda: any(int(p.name.split("_")[3].split("-")[0]) > before for p in newest.glob("*_batch_*-*.pt"))
    )
    one.terminate()
    assert one.wait(PATIENCE) == 75
    went_on = checkpoint.newest(newest)
    assert went_on is not None
    assert "ranks" not in went_on
    assert torch.isfinite(went_on["learner"]["model"]["head.cohorts.0.weight"]).all()


@pytest.mark.slow
def test_two_machines_meet(tmp_path):
    port = 20000 + os.getpid() % 20000
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    words = ("trainer.epochs=1", "trainer.devices=1", "trainer.num_nodes=2")
    meeting = f"trainer.rendezvous=localhost:{port}"
    machines = [start(tmp_path / name, *words, meeting) for name in ("a", "b")]
    said = [machine.communicate(timeout=PATIENCE)[1] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], said
    assert sum((tmp_path / name / "out" / "finished.yaml").exists() for name in ("a", "b")) == 1
