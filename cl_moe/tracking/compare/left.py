"""What runs left behind for figures: accuracy matrices and expert loads, from their artifacts.

Legend: T experiences, R (T + 1, T), N experts of a layer.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from cl_moe.errors import InputError
from cl_moe.tracking.compare.arms import Arm
from cl_moe.tracking.compare.runs import Run, shortened

if TYPE_CHECKING:
    import numpy as np
    from mlflow import MlflowClient
    from numpy.typing import NDArray

    from cl_moe.tracking.artifacts import Matrix

_T = TypeVar("_T")


class Left(NamedTuple):
    """What one run left.

    Args:
        arm: its arm's name.
        run: itself.
        matrix: R and the names of the experiences.
        loads: per block the score-weighted load at the end on each experience's data, (N, T).
    """

    arm: str
    run: Run
    matrix: Matrix
    loads: dict[int, NDArray[np.float64]]


def read_left(client: MlflowClient, arms: Sequence[Arm]) -> tuple[list[Left], list[str]]:
    """What the runs left, as far as it can be drawn together, and notes on the others."""
    from cl_moe.tracking.artifacts import LOADS, MATRIX, read_matrix

    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    found: list[Left] = []
    notes, without = [], []
    for arm in arms:
        for run in arm.runs:
            matrix = _fetch(client, run, MATRIX, read_matrix)
            if matrix is None or not bool(matrix.scores.isfinite().all()):
                without.append(f"{arm.name} {'.'.join(run.seeds)}")
                continue
            loads = _fetch(client, run, LOADS, last_loads) if _has_experts(run) else {}
            if loads is None:
                notes.append(f"No readable {LOADS} of {arm.name} {'.'.join(run.seeds)}: not among the loads.")
            found.append(Left(arm.name, run, matrix, loads or {}))
    if without:
        notes.append(f"Not in the figures, without a readable and finite {MATRIX}: {shortened(without)}.")
    if not found:
        return [], notes
    shape = Counter(run.matrix.scores.shape for run in found).most_common(1)[0][0]
    kept = [run for run in found if run.matrix.scores.shape == shape]
    if others := [run for run in found if run.matrix.scores.shape != shape]:
        names = shortened(f"{run.arm} {'.'.join(run.run.seeds)}" for run in others)
        notes.append(f"Not in the figures, with a {MATRIX} of another size: {names}.")
    return kept, notes


def last_loads(path: Path) -> dict[int, NDArray[np.float64]]:
    """``{block: (N, T)}`` at the last point; layers that were not used are left out."""
    import torch

    from cl_moe.tracking.artifacts import read_loads

    points = read_loads(path)
    stacked = {
        layer: torch.stack([load.score.double() for load in loads], dim=1).numpy()
        for layer, loads in points[-1].items()
        if loads
    }
    return {layer: load for layer, load in stacked.items() if load.sum() > 0}


def _has_experts(run: Run) -> bool:
    """A dense run's file of loads is empty: not worth a download."""
    return any(key.startswith("experts/") for key in run.metrics)


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
        except (InputError, OSError, LookupError, ValueError, TypeError, ArithmeticError):
            return None  # damaged in whatever way; pyarrow's errors are among these
        except store_errors():
            return None
