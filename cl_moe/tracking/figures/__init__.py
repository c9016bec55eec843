"""Figures of one run and of several arms: matplotlib's object interface, no global state, no display."""

from __future__ import annotations

from pathlib import Path

from cl_moe.tracking.figures.arms import compare_curves, compare_loads, compare_matrices
from cl_moe.tracking.figures.load import expert_load
from cl_moe.tracking.figures.matrix import accuracy_matrix, forgetting_curves
from cl_moe.tracking.figures.style import save
from cl_moe.tracking.record import Record

__all__ = [
    "accuracy_matrix",
    "compare_curves",
    "compare_loads",
    "compare_matrices",
    "expert_load",
    "forgetting_curves",
    "save",
    "write_figures",
]


def write_figures(record: Record, folder: Path) -> list[Path]:
    """Write the figures of a run into ``folder``, made if missing; returns their paths.

    ``accuracy_matrix.png``, ``forgetting_curves.png``, ``expert_load.png``; the last says so where a model
    has no expert layers, so that whoever looks for a run's files finds the same ones everywhere.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {
        "accuracy_matrix.png": accuracy_matrix,
        "forgetting_curves.png": forgetting_curves,
        "expert_load.png": expert_load,
    }
    return [save(draw(record), folder / name) for name, draw in drawn.items()]
