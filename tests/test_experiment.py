"""Every named path through the command line: it trains, and the laws of its record hold."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cl_moe import checkpoint
from cl_moe.tracking import artifacts

DIGITS = ("tracking=none", "trainer.epochs=1", "stream.tune_on_first=2", "hydra.run.dir=out")
TEXT = (
    *("stream=text_domains", "tracking=none", "stream.tune_on_first=2", "stream.train_bytes=20000"),
    *("stream.test_bytes=4000", "stream.context=32", "trainer.batch_size=64", "model.width=32"),
    "hydra.run.dir=out",
)
SWITCH, TOP_K = ("layer=moe", "router=switch", "layer.hidden=16"), ("layer=moe", "layer.hidden=16")
PEER = ("layer=peer", "layer.num_experts=64", "layer.k=4", "layer.heads=2")
GROW = ("growth=every_experience", "growth.num_experts=4")
PATHS: dict[str, tuple[str, ...]] = {
    "replay and lwf": (*DIGITS, "strategy=[replay,lwf]", "strategy.replay.memory_size=50"),
    "switch": (*DIGITS, *SWITCH),
    "top_k": (*DIGITS, *TOP_K, "router.k=3"),
    "peer": (*DIGITS, *PEER),
    "joint": (*DIGITS, "strategy=joint"),
    "cumulative": (*DIGITS, "strategy=cumulative"),
    "task": (*DIGITS, "stream.scenario=task", *TOP_K),
    "domain": (*DIGITS, "stream.scenario=domain", "stream.classes_per_experience=5"),
    "permuted": (*DIGITS, "stream=permuted_digits", *TOP_K),
    "cut": (*DIGITS, "stream.cut=2", *TOP_K, *GROW),
    "every_other": (*DIGITS, *TOP_K, "model.slots=every_other", "model.num_blocks=2"),
    "middle": (*DIGITS, *TOP_K, "model.slots=middle", "model.num_blocks=3"),
    "added": (*DIGITS, *TOP_K, "model.slots=added", "model.num_blocks=2", "model.residual=true"),
    "copies": (*DIGITS, *TOP_K, *GROW, "freeze=past_experts"),
    "fresh": (*DIGITS, *SWITCH, *GROW, "growth.init=fresh", "freeze=past_experts_and_router"),
    "zero_output": (*DIGITS, *PEER, *GROW, "growth.init=zero_output", "freeze=all_past"),
    "at": (*DIGITS, *TOP_K, "growth=at", "growth.events={1:4}", "optimizer.state=carry"),
    "lifelong_moe": (*DIGITS, *TOP_K, *GROW, "freeze=past_experts", "strategy=lifelong_moe"),
    "adamw carried": (*DIGITS, *PEER, *GROW, "optimizer=adamw", "optimizer.state=carry"),
    "trainer": (*DIGITS, "trainer.precision=bf16-mixed", "trainer.accumulate=2", "trainer.gradient_clip=1"),
    "text dense": (*TEXT, "seed.order=3"),
    "text switch": (*TEXT, *SWITCH, *GROW, "freeze=past_experts"),
    "text top_k": (*TEXT, *TOP_K, "model.slots=all", "strategy=replay"),
    "text peer": (*TEXT, *PEER, *GROW, "freeze=past_experts", "strategy=lwf"),
    "text at": (*TEXT, *TOP_K, "growth=at", "growth.events={1:2}", "freeze=all_past", "growth.init=fresh"),
}


def state(folder: Path) -> dict[str, Any]:
    found = checkpoint.newest(folder / "checkpoints")
    assert found is not None
    return found


QUICKLY = (
    *("replay and lwf", "switch", "peer", "domain", "cut", "zero_output", "adamw carried"),
    *("text top_k", "text peer"),
)
"""Paths that are not slow: each option of the others is in one of them, or has a test of its own."""


@pytest.mark.parametrize(
    "path", [path if path in QUICKLY else pytest.param(path, marks=pytest.mark.slow) for path in PATHS]
)
def test_a_path_trains_and_its_record_holds_together(path: str, command: Callable, tmp_path: Path):
    done = command(*PATHS[path])
    assert done.status == 0, done.text
    scores, names = artifacts.read_matrix(tmp_path / "out" / artifacts.MATRIX)
    assert scores.shape == (len(names) + 1, len(names))
    assert scores.isfinite().all()
    assert done.objectives == pytest.approx([scores[-1].mean().item()])
    assert "Warning" not in done.text
    grown = [event for event in artifacts.read_ledger(tmp_path / "out/ledger.json") if event["act"] == "grow"]
    assert bool(grown) == any(word.startswith("growth=") for word in PATHS[path])
    if "text" not in path:
        assert ((scores >= 0) & (scores <= 1)).all()
    _loads_agree(tmp_path / "out", any(word.startswith("layer=") for word in PATHS[path]))


def _loads_agree(folder: Path, has_experts: bool) -> None:
    """Every row has loads of its own: as many slots per experience, over the experts there were."""
    points = artifacts.read_loads(folder / artifacts.LOADS)
    assert any(points) == has_experts
    ledger = artifacts.read_ledger(folder / artifacts.LEDGER)
    first = points[0]
    for i, layers in enumerate(points):
        for layer, loads in layers.items():
            assert [load.count.sum() for load in loads] == [load.count.sum() for load in first[layer]]
            born = sum(e["num_experts"] for e in ledger if _born(e, layer) and e["experience"] < i)
            assert loads[0].count.numel() == first[layer][0].count.numel() + born
            assert all(load.kept <= load.count.sum() for load in loads)


def _born(event: dict[str, Any], layer: int) -> bool:
    return event["act"] == "grow" and event["layer"] == layer


@pytest.mark.parametrize("words", [("stream.order=[9,8,7,6,5,4,3,2,1,0]",), ("seed.order=5",)])
def test_an_order_moves_the_experiences(words: tuple[str, ...], command: Callable, tmp_path: Path):
    assert command(*DIGITS, *words).status == 0
    names = artifacts.read_matrix(tmp_path / "out" / artifacts.MATRIX).names
    assert names != ["digits 0-1", "digits 2-3"]
    if "order=[" in words[0]:
        assert names == ["digits 9-8", "digits 7-6"]


@pytest.mark.parametrize("freeze", ["past_experts", "past_experts_and_router", "all_past"])
@pytest.mark.parametrize("layer", [TOP_K, PEER], ids=["moe", "peer"])
def test_what_is_frozen_keeps_its_bytes(
    freeze: str, layer: tuple[str, ...], command: Callable, tmp_path: Path
):
    words = (*DIGITS, *layer, *GROW, f"freeze={freeze}", "optimizer=adamw", "optimizer.weight_decay=0.1")
    done = command(*words, "stream.tune_on_first=3")
    assert done.status == 0, done.text
    folder = tmp_path / "out/checkpoints"
    boundaries = [_weights(next(folder.glob(f"boundary_{i:03d}-*.pt"))) for i in range(4)]
    same = {name for name, before in boundaries[2].items() if torch.equal(before, boundaries[3][name])}
    first = {name for name in boundaries[1] if "cohorts.0." in name and "head" not in name}
    assert first
    assert first <= same
    trunk = {name for name in boundaries[2] if name.startswith("stem")} or {
        name for name in boundaries[1] if "cohorts" not in name and "head" not in name
    }
    assert (trunk <= same) == (freeze == "all_past")


def _weights(file: Path) -> dict[str, torch.Tensor]:
    return torch.load(file, weights_only=True)["learner"]["model"]


IDENTICAL = {
    "dense": ("model.num_blocks=2",),
    "moe": (*TOP_K, *GROW, "freeze=past_experts", "strategy=replay", "strategy.replay.memory_size=50"),
    "switch": (*SWITCH, *GROW, "growth.init=fresh", "optimizer=adamw", "optimizer.state=carry"),
    "peer": (*PEER, *GROW, "strategy=lwf"),
}


@pytest.mark.parametrize(
    "name", ["moe", "peer", *(pytest.param(name, marks=pytest.mark.slow) for name in ("dense", "switch"))]
)
def test_two_runs_of_one_configuration_are_bit_identical(name: str, command: Callable, tmp_path: Path):
    for out in ("a", "b"):
        torch.manual_seed(len(out) + ord(out))  # the program must not draw from what it finds
        assert command(*DIGITS, *IDENTICAL[name], f"hydra.run.dir={out}").status == 0
    for file in (artifacts.MATRIX, artifacts.LEDGER):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    one, two = state(tmp_path / "a")["learner"]["model"], state(tmp_path / "b")["learner"]["model"]
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_another_seed_is_another_run(command: Callable, tmp_path: Path):
    for out, seed in (("a", "seed.init=0"), ("b", "seed.init=1"), ("c", "seed.data=1")):
        assert command(*DIGITS, seed, f"hydra.run.dir={out}").status == 0
    weights = [state(tmp_path / out)["learner"]["model"] for out in "abc"]
    for key in weights[0]:
        if weights[0][key].numel() > 1:
            assert not any(torch.equal(weights[0][key], other[key]) for other in weights[1:])


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        ("stream/backward_transfer", ()),
        ("accuracy/experience_01", ()),
        ("experts/layer_00/unevenness", TOP_K),
        ("cost/params_total", ()),
    ],
)
def test_the_objective_is_what_hydra_gets(objective: str, words: tuple[str, ...], command: Callable):
    (value,) = command(*DIGITS, *words, f"objective={objective}").objectives
    assert math.isfinite(value)


def test_language_returns_minus_the_loss(command: Callable, tmp_path: Path):
    (value,) = command(*TEXT, "stream.tune_on_first=1").objectives
    scores = artifacts.read_matrix(tmp_path / "out" / artifacts.MATRIX).scores
    assert value == pytest.approx(scores[-1].mean().item())
    assert -math.log(256) - 1 < value < 0
