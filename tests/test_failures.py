"""Failures with a name: no memory, no disk. One message, status 1, the state kept; then it goes on."""

from __future__ import annotations

import errno
import importlib
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from cl_moe import failures, memory
from cl_moe.errors import InputError, RunFailedError
from cl_moe.layers import MoE
from cl_moe.learner import Learner
from cl_moe.models import MLPClassifier
from cl_moe.optim import AdamW
from cl_moe.strategies import Replay, Strategy
from cl_moe.strategies.memory import Reservoir

SMALL = ("trainer.epochs=1", "stream.tune_on_first=2", "hydra.run.dir=out")
linux = pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")


pytestmark = pytest.mark.usefixtures("no_drawing")


def too_much(*_: object, **__: object) -> torch.Tensor:
    """A real refusal: more than a processor can address."""
    return torch.empty(2**50, dtype=torch.int8)


def raised(action: Callable[[], object]) -> BaseException:
    with pytest.raises(BaseException) as caught:
        action()
    return caught.value


def failing_call(error: BaseException) -> Callable[[], object]:
    def call() -> None:
        raise error

    return call


CUDA = (
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 139.80 GiB of which "
    "1.25 GiB is free. Process 1 has 138.55 GiB memory in use."
)
REFUSALS: dict[str, tuple[Callable[[], object], str]] = {
    "torch": (too_much, "1.0 PiB more were asked for"),
    "torch overflow": (lambda: torch.empty(2**40, 2**40), "more was asked for"),
    "torch beyond 64 bits": (lambda: torch.empty(10**30), "more was asked for"),
    "numpy": (lambda: np.empty(2**47), "1.00 PiB more were asked for"),
    "numpy overflow": (lambda: np.empty((2**40, 2**40)), "more was asked for"),
    "python": (lambda: bytearray(2**60), "more was asked for"),
    "cuda": (failing_call(torch.cuda.OutOfMemoryError(CUDA)), "20.00 GiB more were asked for"),
    "system": (failing_call(OSError(errno.ENOMEM, "Cannot allocate memory")), "more was asked for"),
}


@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_refused_allocation_is_recognised(refusal: str) -> None:
    action, words = REFUSALS[refusal]
    failure = failures.named(raised(action))
    assert isinstance(failure, RunFailedError)
    assert str(failure).startswith("out of memory while running: ")
    assert words in str(failure)
    if refusal == "cuda":
        assert "the GPU had 1.25 GiB of 139.80 GiB free" in str(failure)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), KeyError("out of memory"), ValueError("no")],
)
def test_other_errors_are_left_as_they_are(error: Exception) -> None:
    assert failures.named(error) is None


def test_an_error_that_has_its_message_keeps_it() -> None:
    """Also one that came from a file: the three parts say more."""
    wrong = InputError(got="a", allowed="b", key="c")
    wrong.__cause__ = OSError(errno.EACCES, "Permission denied", "x")
    outer = RuntimeError("in the factory")
    outer.__cause__ = wrong
    assert failures.named(wrong) is None
    assert failures.named(outer) is None


def test_the_table_of_parts_names_what_there_is() -> None:
    for module, functions in failures.PARTS:
        found = importlib.import_module(module)
        assert all(hasattr(found, name) for name in functions), (module, functions)
    assert all(hasattr(Strategy, hook) for hook in failures.HOOKS)


def test_every_holding_is_counted_and_the_largest_comes_first() -> None:
    model = MLPClassifier((8,), 4, lambda dim: MoE(dim, num_experts=4, hidden=32, router=_top), width=16)
    model.head.grow([0, 1, 2, 3])
    optimizer = AdamW(lr=0.1).build(model.named_parameters())
    model(torch.randn(6, 8))[0].sum().backward()
    optimizer.step()
    replay = Replay(memory_size=5)
    rows = [torch.zeros(5, 100_000), torch.zeros(5, dtype=torch.int64)]
    replay._kept.offer(rows, torch.Generator())
    found = {h.words.split(" (")[0]: h.size for h in memory.holdings(model, {"replay": replay}, [optimizer])}
    weights = 4 * sum(p.numel() for p in model.parameters())
    learnt = 4 * sum(p.numel() for p in model.parameters() if p.grad is not None)
    moments = sum(v.nbytes for of in optimizer.state.values() for v in of.values())
    assert found == {
        "weights": weights,
        "gradients": learnt,
        "optimizer state": moments,
        "strategy replay": 5 * 100_000 * 4 + 5 * 8,
    }
    settings = {"strategy.replay.memory_size": 5, "layer.num_experts": 4, "seed.data": 9, "layer.bias": True}
    held = memory.holdings(model, {"replay": replay}, [optimizer])
    text = str(failures.named(raised(too_much), settings, held))
    sizes = [line for line in text.splitlines() if line.startswith("  ")]
    assert sizes[0].startswith("  strategy replay: ")
    assert len(sizes) == 4
    assert "change: lower strategy.replay.memory_size=5, or layer.num_experts=4" in text
    assert "seed" not in text


def _top(dim: int) -> object:
    from cl_moe.layers import TopK

    return TopK(dim=dim, k=2)


def run_of(folder: Path) -> object:
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    return run


MOMENTS: dict[str, tuple[object, str, tuple[str, ...], str, str]] = {
    "training": (Learner, "training_step", (), "training: ", "lower trainer.batch_size=32"),
    "evaluating": (Learner, "test_step", (), "evaluating: ", "lower trainer.eval_batch_size=256"),
    "stepping": (torch.optim.SGD, "step", (), "training, in the optimizer's step: ", "lower model.width=256"),
    "growing": (
        MoE,
        "grow",
        ("layer=moe", "growth=every_experience"),
        "growing the model: ",
        "growth.num_experts=8",
    ),
    "saving": (torch, "save", (), "saving or loading a checkpoint: ", "weights: "),
    "a strategy": (
        Reservoir,
        "_slots",
        ("strategy=replay",),
        "strategy replay was at work (end): ",
        "lower strategy.replay.memory_size=200",
    ),
}


@pytest.mark.parametrize(
    "moment",
    [
        moment if moment in ("training", "saving") else pytest.param(moment, marks=pytest.mark.slow)
        for moment in MOMENTS
    ],
)
def test_out_of_memory_says_where_and_what_to_lower(
    moment: str, command: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name, words, where, key = MOMENTS[moment]
    original = getattr(owner, name)

    def later(*args: object, **kwargs: object) -> object:
        """Not at once, so that there is something to keep."""
        if list(tmp_path.glob("out/checkpoints/boundary_001-*")):
            too_much()
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, later)
    done = command(*SMALL, *words)
    assert done.status == 1, done.text
    assert f"out of memory while {where}1.0 PiB more were asked for" in done.text
    assert key in done.text
    assert "  weights" in done.text
    assert "the machine has " in done.text
    assert "kept: the state after experience 1" in done.text
    assert f"go on: cl-moe resume={tmp_path / 'out'}" in done.text
    assert "Traceback" not in done.text
    run = run_of(tmp_path)
    assert (run.info.status, run.data.tags["status"]) == ("FAILED", "failed")
    assert "out of memory" in run.data.tags["failure"]
    monkeypatch.setattr(owner, name, original)
    assert command("resume=out").status == 0


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (("model.ffn_hidden=1000000000000",), "model.ffn_hidden=1000000000000"),
        (("layer=moe", "layer.num_experts=1000000000000"), "layer.num_experts=1000000000000"),
        (("layer.hidden=" + "9" * 30,), "layer.hidden=" + "9" * 30),
    ],
)
def test_a_model_that_no_machine_holds(words: tuple[str, ...], key: str, command: Callable) -> None:
    done = command(*SMALL, *words, "tracking=none")
    assert done.status == 1, done.text
    assert done.text.startswith("out of memory while building the model: ")
    assert key in done.text
    assert "Traceback" not in done.text


@linux
def test_a_batch_that_does_not_fit(
    command: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No simulation: the process may take 200 MB more, and a step's activations need more than that."""
    wide = ("layer.hidden=100000", "trainer.batch_size=512", "model.width=16", "trainer.eval_batch_size=32")
    start = Learner.on_train_start
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)

    def narrow(self: Learner) -> None:
        start(self)
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + 200 * 2**20, hard))

    monkeypatch.setattr(Learner, "on_train_start", narrow)
    try:
        done = command(*SMALL, *wide, "stream.scenario=domain", "stream.classes_per_experience=5")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert done.status == 1, done.text
    assert "out of memory while training: " in done.text
    assert "change: lower trainer.batch_size=512 (a larger trainer.accumulate" in done.text
    assert "(ulimit -v)" in done.text
    assert "kept: the state after experience 0" in done.text
    assert run_of(tmp_path).info.status == "FAILED"
