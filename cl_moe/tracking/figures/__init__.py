"""Figures of one run and of several arms: matplotlib's object interface, no global state, no display."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure

from cl_moe.tracking.figures.arms import compare_curves, compare_loads, compare_matrices
from cl_moe.tracking.figures.cohorts import cohort_load, leak_matrix
from cl_moe.tracking.figures.gap import stability_gap
from cl_moe.tracking.figures.load import expert_load
from cl_moe.tracking.figures.matrix import accuracy_matrix, forgetting_curves
from cl_moe.tracking.figures.parts import depth_shares, forgetting_parts
from cl_moe.tracking.figures.style import save
from cl_moe.tracking.record import Record

__all__ = [
    "accuracy_matrix",
    "cohort_load",
    "compare_curves",
    "compare_loads",
    "compare_matrices",
    "depth_shares",
    "expert_load",
    "forgetting_curves",
    "forgetting_parts",
    "leak_matrix",
    "save",
    "stability_gap",
    "write_figures",
]


def write_figures(record: Record, folder: Path) -> list[Path]:
    """Write the figures of a run into ``folder``, made if missing; returns their paths.

    ``accuracy_matrix.png``, ``forgetting_curves.png``, ``expert_load.png``; the last says so where a model
    has no expert layers, so that whoever looks for a run's files finds the same ones everywhere. Others where
    there is something to draw: ``cohort_load.png`` and ``leak_matrix.png`` where experts were born later,
    ``forgetting_parts.png`` where forgetting was decomposed, ``depth_share.png`` with blocks at depth,
    ``stability_gap.png`` where experiences were evaluated inside others.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn: dict[str, Callable[[Record], Figure | None]] = {
        "accuracy_matrix.png": accuracy_matrix,
        "forgetting_curves.png": forgetting_curves,
        "expert_load.png": expert_load,
        "cohort_load.png": cohort_load,
        "leak_matrix.png": leak_matrix,
        "forgetting_parts.png": forgetting_parts,
        "depth_share.png": depth_shares,
        "stability_gap.png": stability_gap,
    }
    made = ((name, draw(record)) for name, draw in drawn.items())
    return [save(figure, folder / name) for name, figure in made if figure is not None]
