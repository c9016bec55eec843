"""``cl-moe-compare --sync``: delivers what the outboxes of runs still hold, long after the runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, final

from cl_moe.errors import InputError, RunFailedError
from cl_moe.tracking import store
from cl_moe.tracking.courier import Courier, known_run
from cl_moe.tracking.entries import Counts, File
from cl_moe.tracking.outbox import OUTBOX, Outbox, read_run_id

PLACES = ("outputs", "multirun")  # of the working folder: where runs are unless they are told otherwise
CONFIG = "config.yaml"


class Report(NamedTuple):
    """What became of one run's outbox."""

    folder: Path
    delivered: Counts = Counts()
    waiting: Counts = Counts()
    gone: tuple[str, ...] = ()  # artifacts that cannot be delivered any more
    running: bool = False  # a live process holds it, and delivers by itself
    trouble: Exception | None = None  # why something waits, or InputError: what the user has to mend

    def __str__(self) -> str:
        if self.running:
            return f"{self.folder}: is running, and delivers by itself"
        parts = [f"delivered {self.delivered}"]
        if any(self.waiting):
            parts.append(f"{self.waiting} still waiting")
        parts += [f"{name} is gone" for name in self.gone]
        if self.trouble is not None:
            kind = "refused" if isinstance(self.trouble, InputError) else store.first_line(self.trouble)
            parts.append(kind)
        return f"{self.folder}: {'; '.join(parts)}"


def command(folders: Sequence[str], uri: str | None) -> None:
    """Delivers, with a line per run that had something to deliver.

    Args:
        folders: of runs, or with runs below them; none: ``outputs`` and ``multirun`` of the working folder.
        uri: the store; None: the one in each run's configuration.

    Raises:
        InputError: a folder is no run's, or its outbox holds what no run writes. The others are delivered.
        RunFailedError: something waits still.
    """
    syncer, reports = Syncer(uri), []
    for folder in _found(folders):
        report = syncer.sync(folder)
        reports.append(report)
        if folders or report != Report(folder):
            print(report, flush=True)
    idle = sum(report == Report(report.folder) for report in reports)
    if idle == len(reports) and not folders:
        print(f"Nothing waits: {idle} outboxes under {' and '.join(PLACES)} of {Path.cwd()}")
    wrong = [report.trouble for report in reports if isinstance(report.trouble, InputError)]
    if wrong:
        for more in wrong[1:]:
            print(more, file=sys.stderr)
        raise wrong[0]
    left = [report for report in reports if any(report.waiting) or report.gone]
    if left:
        raise RunFailedError(
            f"{len(left)} of {len(reports)} runs were not delivered whole; what their stores did not take is "
            "kept in their folders. Run it again when the store answers."
        )


@final
class Syncer:
    """Delivers outboxes, one folder after the other; a store that was away once is not waited for again.

    Args:
        uri: the store; None: the one in each run's configuration.
    """

    def __init__(self, uri: str | None = None) -> None:
        self.uri = uri and store.absolute_uri(uri, "--uri")
        self._away: dict[str, Exception] = {}

    def sync(self, folder: Path) -> Report:
        """Delivers one run's outbox, unless a live process holds its folder. What fails is in the report."""
        from filelock import FileLock, Timeout

        try:
            if not (folder / OUTBOX).is_file():
                raise InputError(
                    got=f"{folder}, without {OUTBOX}", allowed="the folder of a tracked run", key="--sync"
                )
            with FileLock(folder / ".lock", blocking=False):
                return self._deliver(folder)
        except Timeout:
            return Report(folder, running=True)
        except (InputError, OSError) as error:
            return Report(folder, trouble=error)

    def _deliver(self, folder: Path) -> Report:
        outbox = Outbox(folder, read_run_id(folder))
        delivered, gone = Counts(), list[str]()
        if not any(outbox.check()):
            return Report(folder)
        uri = self.uri or _uri(folder)
        store.load_mlflow()
        failures: tuple[type[Exception], ...] = (RunFailedError, *store.store_errors())
        try:
            if uri in self._away:
                raise self._away[uri]
            courier = store.retry(partial(_courier, uri, outbox), store.PAUSES)
            for batch in outbox.waiting():
                if store.retry(partial(courier.deliver, batch.entries), store.PAUSES):
                    delivered = delivered.plus(batch.entries)
                else:
                    gone += [entry.artifact for entry in batch.entries if isinstance(entry, File)]
                outbox.note_sent(batch.end)
        except InputError as error:
            return Report(folder, delivered, outbox.check(), tuple(gone), trouble=error)
        except failures as error:
            self._away[uri] = error
            return Report(folder, delivered, outbox.check(), tuple(gone), trouble=error)
        return Report(folder, delivered, gone=tuple(gone))


def _found(given: Sequence[str]) -> list[Path]:
    """Folders of runs that have an outbox, under the usual places; given ones that hold none as they are."""
    found = list[Path]()
    for place in map(Path, given or PLACES):
        below = sorted(file.parent for file in place.rglob(OUTBOX))
        found += below or ([place] if given else [])
    return list(dict.fromkeys(found))


def _courier(uri: str, outbox: Outbox) -> Courier:
    client, _ = known_run(uri, outbox.run_id, key="--uri (or the working folder, if it is relative)")
    return Courier(uri, client, outbox, known=True)


def _uri(folder: Path) -> str:
    """The store that the run's configuration names; relative to the working folder, as everywhere."""
    import yaml

    try:
        uri = yaml.safe_load((folder / CONFIG).read_bytes())["tracking"]["uri"]
    except (OSError, ValueError, RecursionError, yaml.YAMLError, LookupError, TypeError):
        uri = None
    if not isinstance(uri, str):
        raise InputError(
            got=f"{folder / CONFIG}, which names no store",
            allowed="the tracking.uri of a run, or the store by --uri",
            key="--uri",
        )
    return store.absolute_uri(uri, f"tracking.uri in {folder / CONFIG} (or --uri)")
