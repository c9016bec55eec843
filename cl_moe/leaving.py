"""What a run leaves behind: what it was made with, and as it ends tables, figures, its model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from cl_moe.checkpoint import Checkpoints
from cl_moe.learner import Learner
from cl_moe.stream import Stream
from cl_moe.tracking import artifacts, figures, model_files, overview, provenance
from cl_moe.tracking.model_files import Learnt
from cl_moe.tracking.record import Record
from cl_moe.tracking.tracker import Tracker

log = logging.getLogger(__name__)

_OF_THE_START = ("config.yaml", "command.yaml", provenance.ENVIRONMENT, provenance.DATA, provenance.DIFF)


class Run(Protocol):
    """What is left of a run."""

    stream: Stream
    learner: Learner
    measured: Record
    checkpoints: Checkpoints
    fingerprint: dict[str, Any]
    folder: Path
    tracker: Tracker


def write_start(run: Run) -> None:
    """Write the environment and the checksums of the data that a run begins with; those written stay."""
    if not (run.folder / provenance.ENVIRONMENT).exists():
        provenance.write_environment(run.folder / provenance.ENVIRONMENT)
    if not (run.folder / provenance.DATA).exists():
        provenance.write_data(run.fingerprint, run.folder / provenance.DATA)


def tell_start(tracker: Tracker, folder: Path, anew: bool) -> None:
    """Hand a tracker what a run was made with, and where it goes on if that is elsewhere than it began.

    Args:
        tracker: open, and set to where the run goes on.
        folder: of the run.
        anew: whether it goes on from no checkpoint, so that the tracker has nothing yet.
    """
    for path in (folder / name for name in _OF_THE_START) if anew else ():
        if path.is_file():
            tracker.artifact(path)
    if changed := provenance.write_resumed(folder):
        log.warning("Resumed in another environment (%s): see %s.", changed, provenance.RESUMED)
        tracker.artifact(folder / provenance.RESUMED)


def tell_arrived(run: Run) -> None:
    """Note what a stream has that it had not when the run was here last: the checksums of its data."""
    path, checksums = run.folder / provenance.DATA, run.fingerprint
    if run.stream.open and path.read_text("utf-8") != provenance.data_text(checksums):
        run.tracker.artifact(provenance.write_data(checksums, path))
        run.tracker.tag("data_checksum", provenance.data_checksum(checksums))


def tell_cut(cuts: list[dict[str, Any]], tracker: Tracker, say: Callable[[str], None]) -> None:
    """Say where training ended for want of budget, if it did; in MLflow by the tag ``budget``."""
    for event in cuts:
        batches = event["batches"]
        where = f"{batches} {'batch' if batches == 1 else 'batches'} into" if batches else "before"
        place = f"{where} experience {event['experience'] + 1}"
        told = f"cut {place}: budget.{event['budget']}={event['bound']:g} was reached"
        say(f"training was {told}; what came after was measured, not trained")
        tracker.tag("budget", told)


def tell_decisions(ledger: Sequence[dict[str, Any]], say: Callable[[str], None]) -> None:
    """Sum up what a schedule decided by data, or could not do within its budget, if it did."""
    decided = [event for event in ledger if event["act"] == "decide"]
    if decided:
        wanted, born = (sum(event[what] > 0 for event in decided) for what in ("wanted", "born"))
        told = f"growth was asked for at {wanted} of {len(decided)} boundaries, and came at {born}"
        if over := sorted({event["over_budget"] for event in decided if "over_budget" in event}):
            told += f": {' and '.join(f'growth.budget.{name}' for name in over)} left no room for more"
        say(f"{told}; the figures are in ledger.json")


def left_by(run: Run, say: Callable[[str], None]) -> Iterator[tuple[Path, str | None]]:
    """Write the files of a run that ends; yields each, and the artifact folder that it belongs to."""
    written = artifacts.write_artifacts(run.measured, run.folder)
    written += figures.write_figures(run.measured, run.folder)
    written += overview.write_overview(run.stream, run.folder)
    for path in written:
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
