"""The figures of a comparison: means over the runs of each arm, from the artifacts that the runs left.

Legend: T experiences, N experts of a layer.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from cl_moe.errors import InputError
from cl_moe.tracking.compare_runs import Arm, Run
from cl_moe.tracking.compare_table import is_language

if TYPE_CHECKING:
    import numpy as np
    from mlflow import MlflowClient
    from numpy.typing import NDArray

    from cl_moe.stream import Kind
    from cl_moe.tracking.artifacts import Matrix

_T = TypeVar("_T")


class Left(NamedTuple):
    """What one run left: its matrix, and per block the score-weighted load (N,) at the end, on all data."""

    arm: str
    matrix: Matrix
    loads: dict[int, NDArray[np.float64]]


def draw_figures(client: MlflowClient, arms: Sequence[Arm], folder: Path) -> tuple[list[Path], list[str]]:
    """Write ``forgetting_curves.png``, ``accuracy_matrix.png`` and ``expert_load.png``.

    Args:
        client: of the store that has the artifacts.
        arms: of one stream.
        folder: exists.

    Returns:
        The files written, and notes on runs that are not in them.
    """
    left, notes = read_left(client, arms)
    if not left:
        return [], notes
    from cl_moe.tracking.figures import compare_curves, compare_loads, compare_matrices, save

    matrices: dict[str, list[NDArray[np.float64]]] = {}
    loads: dict[str, dict[int, list[NDArray[np.float64]]]] = {}
    for run in left:
        matrices.setdefault(run.arm, []).append(run.matrix.scores.numpy())
        for layer, load in run.loads.items():
            loads.setdefault(run.arm, {}).setdefault(layer, []).append(load)
    # in another order an experience has another place, so only its number is common
    names = left[0].matrix.names if all(run.matrix.names == left[0].matrix.names for run in left) else None
    kind: Kind = "language" if is_language(arms) else "classification"
    curves, heat = compare_curves(matrices, names, kind), compare_matrices(matrices, names, kind)
    written = [save(curves, folder / "forgetting_curves.png"), save(heat, folder / "accuracy_matrix.png")]
    written.append(save(compare_loads(loads), folder / "expert_load.png"))
    return written, notes


def read_left(client: MlflowClient, arms: Sequence[Arm]) -> tuple[list[Left], list[str]]:
    """What the runs left, as far as it can be drawn together, and a note on the others."""
    from cl_moe.tracking.artifacts import LOADS, MATRIX, read_matrix

    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    found: list[Left] = []
    for arm in arms:
        for run in arm.runs:
            matrix = _fetch(client, run, MATRIX, read_matrix)
            if matrix is not None:
                found.append(Left(arm.name, matrix, _fetch(client, run, LOADS, _last_loads) or {}))
    shapes = Counter(run.matrix.scores.shape for run in found).most_common(1)
    kept = [run for run in found if run.matrix.scores.shape == shapes[0][0]]
    total = sum(len(arm.runs) for arm in arms)
    if len(kept) == total:
        return kept, []
    why = f"they have no {MATRIX}, or other numbers of experiences"
    return kept, [f"Not in the figures: {total - len(kept)} of {total} runs, since {why}."]


def _last_loads(path: Path) -> dict[int, NDArray[np.float64]]:
    from functools import reduce

    from cl_moe.layers.routing import ExpertLoad
    from cl_moe.tracking.artifacts import read_loads

    points = read_loads(path)
    merged = {layer: reduce(ExpertLoad.merge, loads) for layer, loads in points[-1].items() if loads}
    return {layer: load.score.double().numpy() for layer, load in merged.items() if load.score.sum() > 0}


def _fetch(client: MlflowClient, run: Run, name: str, read: Callable[[Path], _T]) -> _T | None:
    """What the run's artifact holds; None if it is missing or not readable."""
    from cl_moe.tracking.store import store_errors

    with tempfile.TemporaryDirectory() as folder:
        try:
            here = run.artifacts.removeprefix("file://")
            # a copy through MLflow costs another second of imports
            path = (
                f"{here}/{name}"
                if here.startswith("/")
                else client.download_artifacts(run.run_id, name, folder)
            )
            return read(Path(path))
        except (InputError, KeyError, ValueError):
            return None
        except store_errors():
            return None
