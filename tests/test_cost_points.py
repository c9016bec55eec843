"""Costs at every boundary: all keys, those of diagnostics, and a peak that is one run's alone."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from omegaconf import DictConfig

from cl_moe import evaluation, launch, leaving
from cl_moe.evaluation import Evaluation
from cl_moe.experiment import run_experiment
from cl_moe.run import Run
from cl_moe.tracking import figures

MIB = 2**20
SMALL = (
    *("stream.tune_on_first=2", "trainer.epochs=1", "trainer.eval_batch_size=512", "model.width=8"),
    *("trainer.accelerator=cpu", "layer=moe", "layer.hidden=4", "layer.num_experts=4"),
)
GROW = ("growth=every_experience", "growth.num_experts=4", "freeze=past_experts")

HERE = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
JOBS = """
import sys
from cl_moe.tracking import figures
figures.write_figures = lambda record, folder: []
from cl_moe.cli import main
main(sys.argv[1:])
"""


@pytest.fixture
def new_run(composed: Callable[..., DictConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """``new_run("growth=never", ...)`` is a run that has not begun; no figures are drawn."""
    monkeypatch.setattr(figures, "write_figures", lambda record, folder: [])
    return lambda *words: launch.build(
        composed(*SMALL, "tracking=none", *words, f"output_dir={tmp_path / 'out'}")
    )


def by_boundary(run: Run) -> list[dict[str, float]]:
    """What a run says it cost at each boundary."""
    found: list[dict[str, float]] = []
    points = run.cost.points
    close = run.close_boundary

    def noting(evaluation: Evaluation) -> None:
        close(evaluation)
        found.append(points())

    run.close_boundary = noting  # type: ignore[method-assign]
    run_experiment(run)
    return found


def test_every_boundary_has_every_cost(new_run: Callable):
    first, *others = by_boundary(new_run())
    assert first["cost/diagnostics_flops"] == 0
    assert first["cost/diagnostics_bytes"] == 0
    # Of nothing trained in no time there is no speed; all else aligns.
    assert all(row.keys() - first.keys() == {"cost/tokens_per_second"} for row in others)
    assert all(first.keys() <= row.keys() for row in others)


def test_what_diagnostics_keep_is_a_cost(new_run: Callable):
    run = new_run("eval.decomposition=always")
    rows = by_boundary(run)
    sizes = [row["cost/diagnostics_bytes"] for row in rows]
    held = [t for then in run.past.routers.values() for t in then.values.values()]
    held += [part for row in run.past.choices.values() for found in row.values() for part in found[:2]]
    distinct = {id(tensor): tensor for tensor in held}.values()
    assert sizes[0] == 0 < sizes[1] < sizes[2] == sum(t.numel() * t.element_size() for t in distinct)


def test_the_shock_is_charged_to_diagnostics(new_run: Callable):
    run = new_run(*GROW, "eval.samples=0", "eval.decomposition=never")
    rows = by_boundary(run)
    assert run.measured.shocks
    tests = [len(experience.test) for experience in run.stream]
    # The pass of the shock, of the grown model over the first test set, takes as much per example as that of
    # the last row over all of them.
    last = rows[2]["cost/eval_flops"] - rows[1]["cost/eval_flops"]
    assert rows[1]["cost/diagnostics_flops"] == 0
    assert rows[2]["cost/diagnostics_flops"] * sum(tests) == last * tests[0]
    assert rows[2]["cost/diagnostics_seconds"] > 0


def test_drawing_is_no_part_of_a_runs_peak(new_run: Callable, monkeypatch: pytest.MonkeyPatch):
    run, shown = new_run("objective=cost/peak_memory_bytes"), []
    before = by_boundary_peak(run, monkeypatch)

    def drawing(run: Run, say: object) -> list[object]:
        shown.append(torch.ones(200 * MIB // 4)[-1].item())
        return []

    monkeypatch.setattr(leaving, "left_by", drawing)
    objective = run_experiment(run)
    assert shown == [1]
    assert objective < before[-1] + 100 * MIB


def by_boundary_peak(run: Run, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The peak at each boundary, filled in as the run goes."""
    found: list[float] = []
    enter = evaluation.enter
    monkeypatch.setattr(
        "cl_moe.run.enter", lambda *words: (enter(*words), found.append(run.cost.peak.bytes()))
    )
    return found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can set a process's peak back")
def test_the_peak_does_not_depend_on_the_place_in_a_sweep(tmp_path: Path):
    words = [*SMALL, "tracking=none", "seed.init=1,2,3", "objective=cost/peak_memory_bytes", "-m"]
    done = subprocess.run(
        [sys.executable, "-c", JOBS, *words], cwd=tmp_path, env=HERE, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    peaks = [yaml.safe_load(file.read_text())["value"] / MIB for file in tmp_path.rglob("finished.yaml")]
    assert len(peaks) == 3
    assert max(peaks) - min(peaks) < 8, peaks
