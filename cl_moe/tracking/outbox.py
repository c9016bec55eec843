"""The file in which a run keeps what it wants to tell, whether or not anybody listens: ``outbox.jsonl``.

One JSON object per line, oldest first: points, tags, artifacts (by a path relative to the run's folder), the
closing status. It only grows, but for a resume, which cuts off the lines of a future that it lives again. How
far it was delivered, and to which MLflow run, stands beside it in ``outbox.sent``. A process may die between
delivering lines and noting so: the same lines then go out again, with the timestamps they had.

Nothing in it is trusted: a line that is none of ours, a path that leaves the run's folder, or a link in place
of a file is refused.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import IO, final

from cl_moe.errors import InputError
from cl_moe.files import regular, sync_folder, write_atomically
from cl_moe.tracking.entries import Batch, Counts, Entry, File, batches, from_line, to_line

OUTBOX = "outbox.jsonl"
SENT = "outbox.sent"
RUN_ID_FILE = "mlflow_run_id"
START_FILE = "mlflow_run_start"  # while an MLflow run is being made: what it will be known by
_MAX_LINE = 100_000  # bytes
_log = logging.getLogger(__name__)


@final
class Outbox:
    """The outbox of one run's folder. Nothing is written before there is something to write.

    Args:
        folder: the run's.
        run_id: of the MLflow run that it is delivered to. What was delivered to another one (which is gone,
            or the folder's id file was removed) waits again.

    Raises:
        InputError: the file is a link, a pipe or a folder.
    """

    def __init__(self, folder: Path, run_id: str) -> None:
        self.folder, self.run_id = folder, run_id
        self.file, self._sent_file = folder / OUTBOX, folder / SENT
        self.length = self._whole_lines()  # bytes; a line that a killed process left half written is not ours
        self.sent = min(self._read_sent(), self.length)

    def append(self, entries: Iterable[Entry], *, durable: bool = False) -> None:
        """Adds lines; ``durable`` waits until they, and those before, are on the disk.

        If somebody removed or cut the file, that is a warning, and what is left of it goes on.

        Raises:
            OSError: the disk is full, say; the file then holds none of them.
            InputError: somebody put something else in its place.
        """
        content = "".join(map(to_line, entries)).encode()
        if not content and not (durable and self.length):
            return
        with self._open(os.O_RDWR | os.O_CREAT) as file:
            if os.fstat(file.fileno()).st_size < self.length:
                self._count_loss()
            file.truncate(self.length)  # whatever a killed process or a full disk left behind the last line
            file.seek(self.length)
            file.write(content)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        if durable and self.length == 0:
            sync_folder(self.folder)
        self.length += len(content)

    def cut(self, length: int) -> int:
        """Keeps the first ``length`` bytes, whole lines only, and forgets what was delivered behind them.

        Returns:
            The bytes that there are now: fewer if the file was shorter or has no line that ends there.
        """
        length = self._whole_lines(length)
        self._forget_sent(length)  # first: new lines must never stand where delivered ones are noted
        if self.file.exists():
            with self._open(os.O_RDWR) as file:
                file.truncate(length)
        self.length = length
        return length

    def waiting(self) -> Iterator[Batch]:
        """What is not noted as delivered, oldest first.

        Raises:
            InputError: a line is none of ours.
        """
        if self.sent >= self.length:
            return
        yield from batches(self._read(self.sent, self.length))

    def check(self) -> Counts:
        """How much waits, all of it looked at.

        Raises:
            InputError: a line is none of ours, or a file leaves the run's folder.
        """
        counts = Counts()
        for batch in self.waiting():
            counts = counts.plus(batch.entries)
            for entry in batch.entries:
                if isinstance(entry, File):
                    self.path(entry)
        return counts

    def note_sent(self, end: int) -> None:
        """Remembers that all before ``end`` was delivered. A full disk costs a second delivery only."""
        self.sent = end
        with suppress(OSError):
            self._write_sent(end)

    def path(self, file: File) -> Path | None:
        """Where a file to deliver lies; None if it is gone.

        Raises:
            InputError: its path leaves the run's folder, or its artifact folder leaves the run's artifacts.
        """
        name, place = PurePosixPath(file.artifact), PurePosixPath(file.folder)
        outside = any(path.is_absolute() or ".." in path.parts for path in (name, place))
        path = self.folder / name
        if outside or not name.parts or not path.resolve().is_relative_to(self.folder.resolve()):
            raise InputError(
                got=f"the artifact {file.artifact!r} (folder {file.folder!r}) in {self.file}",
                allowed="a file inside the run's folder",
                key=str(self.file),
            )
        return path if path.is_file() else None

    def _read(self, begin: int, end: int) -> Iterator[tuple[Entry, int]]:
        with self._open() as file:
            file.seek(begin)
            while begin < end:
                line = file.readline(_MAX_LINE)
                entry = self._parse(line, begin)
                begin += len(line)
                yield entry, begin

    def _whole_lines(self, limit: int | None = None) -> int:
        """Bytes up to the end of the last whole line that ends at ``limit`` or before."""
        try:
            file = self._open()
        except FileNotFoundError:
            return 0
        with file:
            end = os.fstat(file.fileno()).st_size
            end = end if limit is None else min(end, limit)
            while end > 0:
                begin = max(0, end - _MAX_LINE)
                file.seek(begin)
                found = file.read(end - begin).rfind(b"\n")
                if found >= 0:
                    return begin + found + 1
                end = begin
        return 0

    def _read_sent(self) -> int:
        try:
            noted = json.loads(_head(self._sent_file))
            sent = noted["bytes"] if noted["run_id"] == self.run_id else 0
        except (OSError, ValueError, RecursionError, KeyError, TypeError):
            return 0  # unknown: to deliver twice is harmless
        if type(sent) is not int or not 0 <= sent <= self.length:
            return 0 if type(sent) is not int or sent < 0 else self.length
        return self._whole_lines(sent)

    def _write_sent(self, sent: int) -> None:
        text = json.dumps({"run_id": self.run_id, "bytes": sent}) + "\n"
        write_atomically(self._sent_file, text.encode())

    def _forget_sent(self, length: int) -> None:
        """Notes that at most so many bytes were delivered."""
        sent = self._whole_lines(min(self.sent, length))
        if sent < self.sent:
            self._write_sent(sent)
            self.sent = sent

    def _count_loss(self) -> None:
        """Goes on with the whole lines of a file that somebody has made shorter, perhaps with none."""
        left = self._whole_lines()
        _log.warning(
            "%s was %d bytes long, and somebody removed or cut it in mid-run; %d bytes are left. "
            "What stood behind them and was not delivered is lost to MLflow.",
            *(self.file, self.length, left),
        )
        self._forget_sent(left)
        self.length = left

    def _open(self, flags: int = os.O_RDONLY) -> IO[bytes]:
        return os.fdopen(regular(self.file, flags), "rb" if flags == os.O_RDONLY else "r+b")

    def _parse(self, line: bytes, offset: int) -> Entry:
        try:
            return from_line(line)
        except ValueError as error:
            raise InputError(
                got=f"the line at byte {offset} of {self.file}, which is no point, tag, artifact or status",
                allowed="the file as the run wrote it",
                key=str(self.file),
            ) from error


def read_run_id(folder: Path) -> str:
    """The MLflow run of a run's folder.

    Raises:
        InputError: the file does not hold a run id.
    """
    return _digits(folder / RUN_ID_FILE, "an MLflow run id")


def read_start(folder: Path) -> str:
    """What the MLflow run is known by that an earlier process may have made before it was killed.

    Raises:
        InputError: the file does not hold that.
    """
    return _digits(folder / START_FILE, "what a start left")


def undelivered(folder: Path) -> bool:
    """Whether the folder of a run holds what its MLflow run has not got. Asks nobody but the folder."""
    if not (folder / OUTBOX).is_file():
        return False
    try:
        outbox = Outbox(folder, read_run_id(folder))
    except InputError:  # it shall have a new MLflow run, or does not know its own
        return True
    return outbox.sent < outbox.length


def _digits(file: Path, what: str) -> str:
    text = _head(file).decode(errors="replace").strip() if file.is_file() else ""
    if not re.fullmatch("[0-9a-f]{32}", text):
        raise InputError(
            got=f"{text[:40]!r} in {file}", allowed=f"{what}, 32 hexadecimal digits", key=str(file)
        )
    return text


def _head(file: Path) -> bytes:
    """The first bytes of a small file."""
    with open(file, "rb", opener=regular) as opened:
        return opened.read(_MAX_LINE)
