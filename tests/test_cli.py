"""The command line: wrong input, failures, interruption, each with one message and a status."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from mlflow import MlflowClient

from cl_moe import checkpoint
from cl_moe.errors import InputError
from cl_moe.learner import Learner

SMALL = ("trainer.epochs=1", "stream.tune_on_first=2", "hydra.run.dir=out")
TEXT = ("stream=text_domains", "stream.train_bytes=20000", "stream.test_bytes=4000", "stream.context=32")
PEER = ("layer=peer", "layer.num_experts=64", "layer.k=4")


pytestmark = pytest.mark.usefixtures("no_drawing")


def runs(folder: Path) -> list:
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    found = client.search_runs([e.experiment_id for e in client.search_experiments()])
    return [run for run in found if "sweep_parent" not in run.data.tags]


WRONG: dict[tuple[str, ...], tuple[str, ...]] = {  # arguments: words that the message must hold
    ("stream=nonsense",): (
        "got: stream=nonsense",
        "allowed: arriving, coloured_mnist, corrupted_mnist, hf, intents",
        "change: stream",
    ),
    ("layer=moe", "layer.num_expert=4"): (
        "num_experts, num_noops, num_shared, router",
        "change: layer.num_expert",
        "did you mean",
    ),
    ("strategy=replay", "strategy.replay.memory=3"): (
        "memory_size, policy, share",
        "did you mean memory_size?",
    ),
    ("strategy=nonsense",): ("got: strategy=nonsense", "naive, replay", "change: strategy"),
    ("strategy=[naive,nonsense]",): ("got: strategy=nonsense", "naive, replay", "change: strategy"),
    ("strategy=[]",): ("got: strategy=[]", "change: strategy"),
    ("strategy=[joint,cumulative]",): ("got: strategy=[joint,cumulative]", "change: strategy"),
    ("layer=moe", "+layer.num_expert=4"): ("num_experts", "change: layer.num_expert"),
    ("modle=mlp",): ("got: modle=mlp", "model, ", "did you mean model?"),
    ("seed.foo=1",): ("got: seed.foo=1", "data, init, order", "change: seed.foo"),
    ("=3",): ("got: =3",),
    ("layer",): ("got: layer",),
    ("layer=dense,moe",): ("--multirun",),
    ("-m", "layer=dense,moe", "layer.num_expert=4"): ("got: layer.num_expert=4", "change: layer.num_expert"),
    ("stream.classes_per_experience=11",): ("allowed: 1, 2, 5, 10", "stream.classes_per_experience"),
    ("stream.tune_on_first=6",): ("1 .. 5", "change: stream.tune_on_first"),
    ("layer=peer", "layer.num_experts=1000"): ("961 or 1024", "change: layer.num_experts"),
    (*PEER, "growth=every_experience", "growth.num_experts=10"): ("9 or 16", "growth.num_experts"),
    ("layer=moe", "layer.num_experts=4", "router.k=9"): ("1 <= k <= 4", "change: router.k"),
    ("layer=peer", "layer.num_experts=16", "layer.k=17"): ("1 <= k <= 16", "change: layer.k"),
    ("layer=moe", "model.slots=nonsense"): ("every_other, middle, added", "change: model.slots"),
    ("growth=every_experience", "growth.num_experts=4"): ("layer=moe, peer or pkm", "change: layer"),
    ("layer=moe", "growth=at"): ("{experience: experts}", "change: growth.events"),
    ("layer=moe", "growth=at", "growth.events={9:4}"): ("1 .. 4", "change: growth.events"),
    ("layer=moe", "growth=at", "growth.events=3"): ("{key: value, ...} or null", "change: growth.events"),
    ("model=mlp", "stream=text_domains"): ("a model for language", "change: model (or stream)"),
    ("objective=nonsense",): ("stream/average_accuracy", "change: objective"),
    ("objective=stream/forgetting", "stream.tune_on_first=1"): ("stream/average", "change: objective"),
    ("freeze=all_past", "layer=moe", *TEXT): ("growth, or new classes", "change: freeze (or growth)"),
    ("freeze=all_past", "stream.cut=2"): ("growth, or new classes", "change: freeze (or growth)"),
    ("trainer.batch_size=0",): ("at least 1", "change: trainer.batch_size"),
    ("trainer.epochs=many",): ("a whole number", "change: trainer.epochs"),
    ("trainer.epochs=true",): ("a whole number", "change: trainer.epochs"),
    ("model.width=null",): ("a whole number", "change: model.width"),
    ("model.residual=abc",): ("true or false", "change: model.residual"),
    ("layer=moe", "router.balance=nan"): ("a finite number", "change: router.balance"),
    ("trainer.gradient_clip=-1",): ("above 0, or null", "change: trainer.gradient_clip"),
    ("trainer.precision=bf16-true",): ("32-true, bf16-mixed", "change: trainer.precision"),
    ("+foo=1",): ("got: foo, which nothing reads", "change: foo"),
    ("+model.num_classes=3",): ("model.num_classes", "change: model.num_classes"),
    ("layer=moe", "strategy=joint", "growth=every_experience"): ("growth=never", "growth (or strategy)"),
    ("freeze=all_past", "layer=moe", "growth=at", "growth.events={2:4}", *TEXT): (
        "in experience 1",
        "freeze",
    ),
    ("trainer.precision=nonsense",): ("bf16-mixed", "trainer.precision"),
    ("optimizer.lr=-1",): ("above 0", "change: optimizer.lr"),
    ("optimizer.weight_decay=-1",): (">= 0", "change: optimizer.weight_decay"),
    ("checkpoint.keep=0",): ("at least 1, or null", "change: checkpoint.keep"),
    ("auto_resume=3",): ("got: auto_resume=3", "true or false", "change: auto_resume"),
    ("auto_resume=true", "hydra.run.dir=runs/${now:%Y}"): ("no second start", "change: hydra.run.dir"),
    ("branch=nowhere@1",): ("got: branch=nowhere@1", "output folder", "change: branch"),
    ("branch=out",): ("<whole number>", "change: branch"),
    ("++branch=3",): ("got: branch=3", "<whole number>", "change: branch"),
    ("tracking.uri=./mlruns",): ("sqlite:///<file>", "change: tracking.uri"),
    ("seed.init=one",): ("a whole number", "change: seed.init"),
    ("seed.order=1", "stream.order=[9,8,7,6,5,4,3,2,1,0]"): ("one of them", "stream.order or seed.order"),
    ("resume=nowhere",): ("got: resume=nowhere", "output folder", "change: resume"),
    ("-m", "experiment=glob(nothing*)"): ("which matches nothing", "demo_lwf", "change: experiment"),
    ("-m", "model.width=glob(*)"): ("the name of a group", "change: model.width"),
    ("resume=.",): ("got: resume=.", "output folder", "change: resume"),
}


@pytest.mark.parametrize("arguments", WRONG, ids=" ".join)
def test_wrong_input_is_one_message_and_status_2(
    arguments: tuple[str, ...], command: Callable, tmp_path: Path
):
    done = command(*arguments)
    assert done.status == 2, done.text
    for words in WRONG[arguments]:
        assert words in done.text
    for part in ("got: ", "allowed: ", "change: "):
        assert done.text.count(part) == 1
    assert done.text.startswith("got: ")
    assert "Traceback" not in done.text
    assert "before training" not in done.text
    assert not [run for run in runs(tmp_path) if run.info.status == "RUNNING"]
    assert not list(tmp_path.glob("**/checkpoints/boundary_001*"))
    assert not (tmp_path / "outputs").exists()


def test_a_file_without_the_column(command: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pd.DataFrame({"split": ["train", "validation"], "words": ["a b", "c d"]}).to_parquet(
        tmp_path / "x.parquet"
    )
    monkeypatch.setenv("CL_MOE_DATA", str(tmp_path))
    done = command("stream=text_domains", "stream.domains=[x]")
    assert done.status == 2
    assert "columns split, words\nallowed: a column 'text'\nchange: stream.column" in done.text


def test_a_task_file_of_the_user_that_hides_ours(command: Callable, monkeypatch: pytest.MonkeyPatch):
    Path("tasks.py").write_text("")
    saved = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "tasks"}
    for name in saved:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(os.getcwd())
    done = command("tracking=none")
    assert (done.status, done.text.count("got: ")) == (2, 1)
    assert "tasks" in done.text


def test_a_loss_that_is_not_finite(command: Callable, tmp_path: Path):
    done = command(*SMALL, "optimizer.lr=1e10")
    assert done.status == 1, done.text
    assert "loss not finite at step" in done.text
    assert "kept: the state after experience 0 of 2, in" in done.text
    assert f"go on: cl-moe resume={tmp_path / 'out'}" in done.text
    assert "Traceback" not in done.text
    assert done.text.count("not finite") == 1
    (run,) = runs(tmp_path)
    assert (run.info.status, run.data.tags["status"]) == ("FAILED", "failed")
    assert "at step" in run.data.tags["failure"]
    kept = checkpoint.newest(tmp_path / "out/checkpoints")
    assert kept is not None
    assert kept["boundary"] == 0
    again = command("resume=out")
    assert (again.status, again.text.count("not finite")) == (1, 1)
    assert len(runs(tmp_path)) == 1


def test_a_full_disk_is_a_failure_with_a_name(command: Callable, monkeypatch: pytest.MonkeyPatch):
    save = checkpoint.save

    def full(folder: Path, moment: checkpoint.Moment, *rest: object) -> Path:
        if moment.boundary == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(folder, moment, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint, "save", full)
    done = command(*SMALL)
    assert done.status == 1, done.text
    assert "the disk is full" in done.text
    assert "\nkept: the state after experience 0 of 2, in" in done.text
    assert "defect" not in done.text


def test_the_other_jobs_of_a_multirun_go_on(command: Callable, tmp_path: Path):
    done = command("-m", *SMALL, "hydra.sweep.dir=sweep", "optimizer.lr=1e10,0.1")
    assert done.status == 1, done.text
    assert done.text.count("not finite") == 1
    assert "job 0 (" in done.text
    assert sorted(run.info.status for run in runs(tmp_path)) == ["FAILED", "FINISHED"]
    assert (tmp_path / "sweep/1/accuracy_matrix.csv").exists()
    assert len(done.objectives) == 1


def test_wrong_input_in_one_job_of_a_multirun(command: Callable, tmp_path: Path):
    done = command("-m", *SMALL, "tracking=none", "hydra.sweep.dir=sweep", "optimizer.lr=-1,0.1")
    assert done.status == 2
    assert done.text.count("change: optimizer.lr") == 1
    assert (tmp_path / "sweep/1/accuracy_matrix.csv").exists()


@pytest.mark.parametrize(
    "where",
    [
        "training_step",
        *(pytest.param(x, marks=pytest.mark.slow) for x in ("test_step", "configure_optimizers")),
    ],
)
@pytest.mark.parametrize(
    ("number", "status", "words"),
    [(signal.SIGINT, 130, "go on: cl-moe resume="), (signal.SIGTERM, 75, "go on: cl-moe resume=")],
)
def test_a_signal_stops_a_run_and_it_can_go_on(
    number: int,
    status: int,
    words: str,
    where: str,
    command: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    original, calls = getattr(Learner, where), []

    def pressed(self: Learner, *args: object) -> object:
        calls.append(1)
        if self.experience is not None and self.experience.index == 1 and len(calls) > 0:
            monkeypatch.setattr(Learner, where, original)
            signal.raise_signal(number)
        return original(self, *args)

    monkeypatch.setattr(Learner, where, pressed)
    stopped = command(*SMALL)
    assert stopped.status == status
    assert words in stopped.text
    assert handlers == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))
    assert "Traceback" not in stopped.text
    (run,) = runs(tmp_path)
    assert (run.info.status, run.data.tags["status"]) == ("KILLED", "stopped")
    done = command(f"resume={run.info.run_id}")
    assert done.status == 0, done.text
    (run,) = runs(tmp_path)
    assert (run.info.status, run.data.tags["status"]) == ("FINISHED", "finished")
    assert run.data.tags["failure"] == "none"


def test_our_own_defects_say_so(command: Callable, monkeypatch: pytest.MonkeyPatch):
    def broken(self: Learner, *args: object) -> None:
        raise AttributeError("a slip")

    monkeypatch.setattr(Learner, "on_train_start", broken)
    done = command(*SMALL, "tracking=none")
    assert (done.status, "Traceback" in done.text) == (1, False)
    assert "AttributeError: a slip" in done.text
    assert "HYDRA_FULL_ERROR=1" in done.text


def test_hydra_full_error_shows_the_traceback(command: Callable, monkeypatch: pytest.MonkeyPatch):
    from cl_moe import cli

    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(InputError):
        cli.main([*SMALL, "tracking=none", "objective=nonsense"])
    assert os.environ["HYDRA_FULL_ERROR"] == "1"


def test_the_process_is_left_as_it_was(command: Callable, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    before = list(sys.argv)
    command("stream=nonsense")
    assert "HYDRA_FULL_ERROR" not in os.environ
    assert sys.argv == before


LIGHT = """
import sys
sys.argv[0] = "cl-moe"
from cl_moe import cli
try:
    cli.main(sys.argv[1:])
except SystemExit as ended:
    heavy = {"torch", "lightning", "mlflow", "datasets", "pandas", "matplotlib"} & set(sys.modules)
    sys.exit(f"imported {heavy}" if heavy else ended.code)
"""


@pytest.mark.parametrize("flags", [("--help",), ("--cfg", "job"), ("stream=nonsense",)])
def test_quick_answers_import_nothing_heavy(flags: tuple[str, ...], tmp_path: Path):
    words = [sys.executable, "-W", "error", "-c", LIGHT, *flags]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == (2 if "stream=nonsense" in flags else 0), done.stderr
    assert not list(tmp_path.iterdir())


def test_help_names_the_groups(command: Callable):
    done = command("--help")
    assert done.status == 0
    for group in ("stream", "strategy", "layer", "growth", "freeze", "experiment"):
        assert f"{group}: " in done.text
