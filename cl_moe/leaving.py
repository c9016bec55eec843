"""What a run leaves behind as it ends: tables, figures, what it was made with, its model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from cl_moe.checkpoint import Checkpoints
from cl_moe.learner import Learner
from cl_moe.stream import Stream
from cl_moe.tracking import artifacts, figures, model_files, overview, provenance
from cl_moe.tracking.model_files import Learnt
from cl_moe.tracking.record import Record

_OF_THE_START = ("config.yaml", "command.yaml", provenance.DIFF)
"""Files that were written as the run began, if there was anything to write."""


class Run(Protocol):
    """What is left of a run."""

    stream: Stream
    learner: Learner
    measured: Record
    checkpoints: Checkpoints
    fingerprint: dict[str, Any]
    folder: Path


def left_by(run: Run, say: Callable[[str], None]) -> Iterator[tuple[Path, str | None]]:
    """Write the files of a run that ends; yields each, and the artifact folder that it belongs to."""
    written = artifacts.write_artifacts(run.measured, run.folder)
    written += figures.write_figures(run.measured, run.folder)
    written += overview.write_overview(run.stream, run.folder)
    written.append(provenance.write_data(run.fingerprint["stream"], run.folder / provenance.DATA))
    for path in [*written, *(run.folder / name for name in _OF_THE_START)]:
        if path.exists():
            yield path, None
    for path in _model(run, say):
        yield path, model_files.MODEL


def _model(run: Run, say: Callable[[str], None]) -> list[Path]:
    """The files of the model, unless it is too large."""
    model, limit = run.learner.model, run.checkpoints.model_mb
    size = model_files.megabytes(model)
    if limit == 0 or not (run.folder / model_files.CONFIG).is_file():
        return []
    if limit is not None and size > limit:
        why = f"checkpoint.model_mb={limit:g}"
        say(f"the model takes {size:.3g} MB, so it is left in the checkpoints ({why})")
        return []
    learnt = Learnt(
        run.stream.name,
        run.measured.names[: run.measured.experiences_trained],
        run.stream.input_shape,
        run.stream.num_classes,
        model.head.classes,
    )
    return model_files.write_model(model, run.learner.ledger, learnt, run.folder)
