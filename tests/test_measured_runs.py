"""What is measured of every kind of run holds together, and an end in the middle of it changes no bit."""

from __future__ import annotations

import math
import runpy
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig

from cl_moe import checkpoint, launch
from cl_moe.experiment import run_experiment
from cl_moe.measuring import Past
from cl_moe.metrics.functional import backward_transfer, up_to
from cl_moe.models.rewind import RouterState
from cl_moe.tracking import artifacts, figures
from cl_moe.tracking.record import Record

differences = runpy.run_path(str(Path(__file__).with_name("chaos.py")))["differences"]
DIGITS = (
    *("tracking=none", "trainer.epochs=1", "stream.tune_on_first=3", "model.width=16"),
    "eval.decomposition=always",
)
MOE = ("layer=moe", "layer.hidden=8", "layer.num_experts=4")
GROW = ("growth=every_experience", "growth.num_experts=4", "freeze=past_experts")
PEER = ("layer=peer", "layer.num_experts=16", "layer.k=2", "layer.heads=2")
GRIDS = ("growth=every_experience", "growth.num_experts=16", "growth.init=fresh")
TEXT = (
    *("stream=text_domains", "stream.train_bytes=6000", "stream.test_bytes=2000", "stream.context=32"),
    "trainer.batch_size=32",
)
KINDS = {
    "moe": (*MOE, *GROW),
    "peer": (*PEER, *GRIDS, "strategy=replay"),
    "dense": (),
    "joint": (*MOE, "strategy=joint"),
    "cut": (*MOE, "stream.cut=2"),
    "one experience": (*MOE, "stream.tune_on_first=1"),
    "text pkm": (*TEXT, *PEER, "layer=pkm"),
    "text with spans hidden": (*TEXT, *MOE, "model=encoder", "router=expert_choice"),
}

QUICKLY = ("dense", "cut", "one experience", "text with spans hidden")
"""Kinds that are not slow."""


pytestmark = pytest.mark.usefixtures("no_drawing")


@pytest.mark.parametrize(
    "kind", [kind if kind in QUICKLY else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_every_kind_of_run_is_measured(kind: str, composed: Callable[..., DictConfig], tmp_path: Path):
    run = launch.build(composed(*DIGITS, *KINDS[kind], f"output_dir={tmp_path}"))
    run_experiment(run)
    record = run.measured
    R = record.matrix
    for i, rewound in record.rewound.items():
        weights = (R.diagonal(offset=-1)[: i - 1] - rewound).mean()
        routing = (rewound - R[i, : i - 1]).mean()
        assert (weights + routing).item() == pytest.approx(-backward_transfer(up_to(R, i)).item(), abs=1e-12)
        if kind == "dense":
            assert routing >= 0, "only new classes can be in the way of a dense model"
        if kind == "joint":
            assert torch.equal(rewound, R[i, : i - 1]), "nothing changed since, and nothing is run"
    assert list(record.rewound) == list(range(2, len(R)))
    assert len(record.points) == len(R)
    for i in range(len(R)):
        _points_hold(record, i)


def _points_hold(record: Record, i: int) -> None:
    points, layers = record.points[i], len(record.loads[-1])
    drifts = {key for key in points if "/drift_experience_" in key}
    assert len(drifts) == i * layers
    for key in drifts:
        drift, saturation = points[key], points.get(key.replace("drift", "saturation"), 1.0)
        assert 0 <= drift <= 1
        assert 0 <= saturation <= 1
        if key.endswith(f"experience_{i - 1:02d}"):
            assert (drift, saturation) == (0, 1), "nothing has moved since a moment ago"
    assert len([key for key in points if key.endswith("/leak")]) == (layers if i >= 2 else 0)
    bounds = {"latency": (1, 1e9), "leak": (0, 1), "task_information": (-0.5, 1)}
    for key, value in points.items():
        low, high = bounds.get(key.rsplit("/", 1)[1], (-1e9, 1e9))
        high = math.inf if "perplexity/" in key else high  # a word's, before training, is exp of 30 nats
        assert low <= value <= high, key
    for shares in record.shares[i].values():
        torch.testing.assert_close(shares.sum(dim=0), torch.ones(shares.shape[1]).double())


@pytest.fixture(scope="module")
def undisturbed(command_in: Callable, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Sequence[str]]:
    """A run in the folder ``out``, and its arguments."""
    words = (*DIGITS, *PEER, *GRIDS, "freeze=past_experts_and_router", "optimizer=adamw")
    words = (*words, "optimizer.state=carry", "hydra.run.dir=out")
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "write_figures", lambda record, folder: [])
        done = command_in(folder, *words)
    assert done.status == 0, done.text
    return folder / "out", words


def state_of(folder: Path) -> dict[str, Any]:
    state = checkpoint.newest(folder / "checkpoints")
    assert state is not None
    return {part: state[part] for part in ("learner", "record", "past")}


@pytest.mark.slow
@pytest.mark.parametrize(("at", "stop"), [(1, True), (2, False)])
def test_an_end_in_the_middle_of_it_changes_no_bit(
    at: int, stop: bool, undisturbed: Any, command: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Stopped in order, or broken off, while a batch is answered with the router of then."""
    through, words = undisturbed
    logits, calls = RouterState.logits, []

    def interrupted(*args: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == at and not stop:
            raise RuntimeError("a power cut")
        if len(calls) == at:
            signal.raise_signal(signal.SIGTERM)
        return logits(*args)

    with monkeypatch.context() as patch:
        patch.setattr(RouterState, "logits", interrupted)
        assert command(*words).status == (75 if stop else 1)
    done = command("resume=out")
    assert done.status == 0, done.text
    assert differences(state_of(tmp_path / "out"), state_of(through)) == []
    for name in (artifacts.MATRIX, artifacts.LEDGER, artifacts.LEAK):
        assert (tmp_path / "out" / name).read_bytes() == (through / name).read_bytes()
    loads = [artifacts.read_loads(folder / artifacts.LOADS) for folder in (tmp_path / "out", through)]
    assert differences(*loads) == []


def test_a_past_survives_a_checkpoint(undisturbed: Any):
    state = checkpoint.newest(undisturbed[0] / "checkpoints")
    assert state is not None
    past = Past()
    past.load_state_dict(state["past"])
    assert differences(past.state_dict(), state["past"]) == []
    name = "blocks.0.cohorts.0.keys"
    assert past.routers[2].values[name] is past.routers[1].values[name], "one copy of what stood still"
    tensors = [value for then in past.routers.values() for value in then.values.values()]
    tensors += [part for row in past.choices.values() for found in row.values() for part in found[:2]]
    distinct = {value.data_ptr(): value.numel() * value.element_size() for value in tensors}
    assert past.num_bytes == sum(distinct.values())
    assert past.num_bytes < sum(value.numel() * value.element_size() for value in tensors)


@pytest.mark.slow
def test_a_branch_goes_on_with_the_past_of_its_parent(undisturbed: Any, command: Callable, tmp_path: Path):
    through, _ = undisturbed
    shutil.copytree(through, tmp_path / "out")
    done = command("branch=out@2", "hydra.run.dir=child")
    assert done.status == 0, done.text
    assert differences(state_of(tmp_path / "child"), state_of(through)) == []
    loads = [artifacts.read_loads(folder / artifacts.LOADS) for folder in (tmp_path / "child", through)]
    assert differences(*loads) == []
