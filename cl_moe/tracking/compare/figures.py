"""The figures of a comparison: means over the runs of each arm, as PNG and as SVG.

Legend: T experiences, R (T + 1, T), N experts of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cl_moe.tracking.compare.arms import Arm, kind_of
from cl_moe.tracking.compare.left import Left

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

WEIGHTS, ROUTING = "stream/forgetting_weights", "stream/forgetting_routing"


def draw_figures(left: Sequence[Left], arms: Sequence[Arm], folder: Path) -> list[Path]:
    """Write what can be drawn into ``folder``, each figure as PNG and as SVG; returns the files.

    ``forgetting_curves``, ``accuracy_matrix`` and ``expert_load`` from the artifacts, ``pareto`` from the
    metrics, and ``forgetting_parts`` if a run has them.

    Args:
        left: artifacts that can be drawn together.
        arms: of one stream.
        folder: exists.
    """
    from cl_moe.stream import UNITS
    from cl_moe.tracking import figures
    from cl_moe.tracking.figures.tradeoff import forgetting_parts, pareto

    kind = kind_of(arms)
    drawn: dict[str, Figure] = {}
    if left:
        matrices, names = by_arm(left), common_names(left)
        drawn["forgetting_curves"] = figures.compare_curves(matrices, names, kind)
        drawn["accuracy_matrix"] = figures.compare_matrices(matrices, names, kind)
        drawn["expert_load"] = figures.compare_loads(summed_loads(left))
    drawn["pareto"] = pareto(tradeoffs(arms), kind)
    if parts := forgetting_split(arms):
        drawn["forgetting_parts"] = forgetting_parts(parts, UNITS[kind])
    written = []
    for name, figure in drawn.items():
        written.append(figures.save(figure, folder / f"{name}.png"))
        figure.set_layout_engine("none")  # as it was laid out: once is enough
        written.append(figures.save(figure, folder / f"{name}.svg"))
    return written


def by_arm(left: Sequence[Left]) -> dict[str, list[NDArray[np.float64]]]:
    """``{arm: [R of each run]}``."""
    matrices: dict[str, list[NDArray[np.float64]]] = {}
    for run in left:
        matrices.setdefault(run.arm, []).append(run.matrix.scores.numpy())
    return matrices


def common_names(left: Sequence[Left]) -> list[str] | None:
    """Names of the experiences; None if the orders differ: then only an experience's place is common."""
    names = left[0].matrix.names
    return names if all(run.matrix.names == names for run in left) else None


def summed_loads(left: Sequence[Left]) -> dict[str, dict[int, list[NDArray[np.float64]]]]:
    """``{arm: {block: [load of each run, (N,)]}}`` at the end, on the data of all experiences."""
    loads: dict[str, dict[int, list[NDArray[np.float64]]]] = {run.arm: {} for run in left}
    for run in left:
        for layer, load_NT in run.loads.items():
            loads[run.arm].setdefault(layer, []).append(load_NT.sum(axis=1))
    return loads


def tradeoffs(arms: Sequence[Arm]) -> dict[str, list[tuple[float, float]]]:
    """``{arm: [(learning accuracy or loss, forgetting) of each run that has both]}``."""
    from cl_moe.stream import is_loss

    learning = "stream/learning_loss" if is_loss(kind_of(arms)) else "stream/learning_accuracy"
    keys = (learning, "stream/forgetting")
    return {
        arm.name: [
            (run.metrics[keys[0]], run.metrics[keys[1]])
            for run in arm.runs
            if all(key in run.metrics for key in keys)
        ]
        for arm in arms
    }


def forgetting_split(arms: Sequence[Arm]) -> dict[str, tuple[float, float]]:
    """``{arm: mean forgetting by (weights, routing)}`` of the arms that measured both."""
    found = {arm.name: (arm.spread(WEIGHTS), arm.spread(ROUTING)) for arm in arms}
    return {name: (one.mean, two.mean) for name, (one, two) in found.items() if one.num and two.num}
