"""A run that goes on from any moment inside an experience ends with the bits of one never stopped."""

from __future__ import annotations

import runpy
import shutil
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig

import conf
from cl_moe import checkpoint, launch
from cl_moe.checkpoint import Moment
from cl_moe.experiment import run_experiment
from cl_moe.tracking import artifacts

SMALL = (
    *("tracking=none", "stream.tune_on_first=2", "trainer.epochs=2", "trainer.batch_size=64"),
    *("trainer.eval_batch_size=512", "model.width=16", "checkpoint.every_steps=1"),
)
GROW = ("growth=every_experience", "growth.num_experts=4", "freeze=past_experts")
MOE = ("layer=moe", "layer.hidden=8", "layer.num_experts=4", *GROW)
PEER = ("layer=peer", "layer.num_experts=16", "layer.k=2", "layer.heads=2", "growth.num_experts=16")
differences = runpy.run_path(str(Path(__file__).with_name("chaos.py")))["differences"]
Run = Callable[[Path, Sequence[str]], None]
STRATEGIES = sorted(path.stem for path in Path(conf.__path__[0], "strategy").glob("*.yaml"))
OTHERWISE = ("joint", "distill_from", "sparse_memory", "continual_backprop", "demix", "l2p")
"""Need a teacher (see test_distilling), product keys, dense layers, tasks or patches; or train first."""
TEXT = (
    *("stream=text_domains", "stream.train_bytes=6000", "stream.test_bytes=2000", "stream.context=32"),
    *("model.width=16", "trainer.batch_size=32", "growth=never", "freeze=never"),
)
QUICK = {name: (f"strategy.{name}.samples=8",) for name in ("ewc", "mas")}
ARMS: dict[str, tuple[str, ...]] = {
    **{
        f"strategy {name}": (*MOE, f"strategy={name}", *QUICK.get(name, ()))
        for name in STRATEGIES
        if name not in OTHERWISE
    },
    "strategy joint": ("layer=moe", "layer.hidden=8", "strategy=joint"),
    "strategy sparse_memory": (
        *(*GROW, *PEER, "strategy=sparse_memory", "optimizer.momentum=0.9", "optimizer.state=carry"),
        *(
            "strategy.sparse_memory.num_background=4",
            "strategy.sparse_memory.top_t=3",
            "trainer.accumulate=2",
        ),
    ),
    "strategy continual_backprop": (
        *("strategy=continual_backprop", "strategy.continual_backprop.maturity=1", "trainer.accumulate=2"),
        "strategy.continual_backprop.rate=0.1",
    ),
    "strategy demix": (*MOE, "strategy=demix", "stream.scenario=task", "freeze=never"),
    "strategy l2p": ("model=patch_transformer", "strategy=l2p"),
    "head whole": ("stream=peers_digits", "strategy=[der,weight_aligning]", "trainer.accumulate=2"),
    "strategies together": (*MOE, "strategy=[replay,lwf]", "optimizer=adamw", "optimizer.state=carry"),
    "layer dense": ("strategy=replay", "optimizer.momentum=0.9"),
    "layer moe switch": (*MOE, "router=switch", "optimizer=adamw"),
    "layer peer": (
        *(*GROW, *PEER, "optimizer=adamw", "optimizer.state=carry", "optimizer.rows=row"),
        *("trainer.accumulate=2", "trainer.gradient_clip=0.1"),
    ),
    "accumulating": (*MOE, "trainer.accumulate=2", "trainer.gradient_clip=1", "trainer.precision=64-true"),
    "looking inside": (*MOE, "strategy=replay", "layer.dropout=0.5", "trainer.accumulate=2", "eval.every=1"),
    "one batch": (*MOE, "trainer.batch_size=1000", "trainer.epochs=3"),
    "layer pkm": (*GROW, *PEER, "layer=pkm", "layer.retrieval.policy=sum"),
    "layer peer of shells": (*PEER[:-1], "growth=at", "growth.events={1:9}", "layer.retrieval.grow_by=shell"),
    "router gshard": (*MOE, "router=gshard", "router.scores.function=sigmoid", "layer.num_shared=1"),
    "router expert_choice": (*MOE, "router=expert_choice", "model=patch_transformer", "layer.dropout=0.1"),
    "balanced without a loss": (*MOE, "router.scores.bias_rate=1e-3", "trainer.accumulate=2"),
    "growth on drift": (
        *(*MOE, "stream.cut=2", "growth=on_drift", "growth.samples=32", "growth.effect=0.5"),
        *(
            "growth.level=0.2",
            "growth.budget.experts=10",
            "freeze=idle",
            "freeze.threshold=2",
            "strategy=replay",
        ),
    ),
    "growth on plateau": (*MOE, "stream.cut=2", "growth=on_plateau", "growth.patience=1", "freeze=aged"),
    "growth on saturation": (*GROW, *PEER, "growth=on_saturation", "growth.threshold=0.3"),
    "recycling": (
        *("layer=moe", "layer.hidden=8", "layer.num_experts=8", "router.balance=0", "router.k=1"),
        *(
            "stream.cut=2",
            "prune=dead_experts",
            "prune.threshold=0.5",
            "optimizer=adamw",
            "optimizer.state=carry",
        ),
    ),
    "pruning": (*GROW, *PEER, "stream.cut=2", "prune=idle_cohorts", "prune.threshold=2", "prune.patience=1"),
    "text": ("model=decoder", *TEXT, "strategy=replay"),
    "text in depth": ("model=decoder", *TEXT, "model.depth=0.5", "model.num_blocks=4"),
    "text with spans hidden": ("model=encoder", *TEXT, "layer=moe", "router=expert_choice"),
}

QUICKLY = ("strategies together", "layer peer", "accumulating")
"""Arms that are not slow: memories and a teacher, tables grown and frozen, steps of several batches."""


pytestmark = pytest.mark.usefixtures("no_drawing")


@pytest.fixture(scope="module")
def run_in(composed: Callable[..., DictConfig]) -> Run:
    def run(folder: Path, words: Sequence[str]) -> None:
        run_experiment(launch.build(composed(*SMALL, *words, f"output_dir={folder}")))

    return run


@pytest.fixture(scope="module")
def undisturbed(
    run_in: Run, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, list[Path]]]:
    """Of an arm: the folder in which it ran through, and a copy of every checkpoint it wrote on the way."""

    @cache
    def ran(arm: str) -> tuple[Path, list[Path]]:
        folder, copies = tmp_path_factory.mktemp("through"), []
        original = checkpoint.Checkpoints.save

        def copying(self: Any, saved_in: Path, moment: Moment, state: Any, best: int) -> Path:
            written = original(self, saved_in, moment, state, best)
            copies.append(Path(shutil.copy(written, tmp_path_factory.mktemp("copy"))))
            return written

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoint.Checkpoints, "save", copying)
            run_in(folder, ARMS[arm])
        return folder, copies

    return ran


def final(folder: Path) -> dict[str, Any]:
    """Everything at the end that is no time of the day."""
    state = checkpoint.newest(folder / "checkpoints")
    assert state is not None
    del state["cost"]["clock"]
    return state


def goes_on(run_in: Run, copy: Path, through: Path, folder: Path, words: Sequence[str]) -> None:
    (folder / "checkpoints").mkdir(parents=True)
    shutil.copy(copy, folder / "checkpoints")
    run_in(folder, words)
    assert differences(final(folder), final(through)) == [], copy.name
    for name in (artifacts.MATRIX, artifacts.LEDGER):
        assert (folder / name).read_bytes() == (through / name).read_bytes()


def chosen(copies: list[Path]) -> list[Path]:
    """The first batch of the second experience, the last one of its first epoch, and its last but one."""
    inside = [copy for copy in copies if copy.name.startswith("boundary_001_batch")]
    inside = inside or [copy for copy in copies if "_batch_" in copy.name]
    return [inside[0], inside[len(inside) // 2], inside[-1]]


@pytest.mark.parametrize(
    "arm", [arm if arm in QUICKLY else pytest.param(arm, marks=pytest.mark.slow) for arm in ARMS]
)
def test_interrupted_equals_uninterrupted(arm, run_in, undisturbed, tmp_path):
    through, copies = undisturbed(arm)
    for copy in dict.fromkeys(chosen(copies)):
        goes_on(run_in, copy, through, tmp_path / copy.stem, ARMS[arm])


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["strategies together", "accumulating", "layer peer", "one batch"])
def test_every_moment_of_a_run(arm, run_in, undisturbed, tmp_path):
    through, copies = undisturbed(arm)
    for copy in copies:
        goes_on(run_in, copy, through, tmp_path / copy.stem, ARMS[arm])


def test_saving_inside_changes_nothing(run_in, undisturbed, tmp_path):
    through, copies = undisturbed("strategies together")
    assert any("_batch_" in copy.name for copy in copies)
    run_in(tmp_path, (*ARMS["strategies together"], "checkpoint.every_steps=null"))
    assert not list((tmp_path / "checkpoints").glob("*_batch_*"))
    assert differences(final(tmp_path), final(through)) == []
