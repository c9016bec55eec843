"""The file in which a run keeps what it wants to tell, whether or not anybody listens: ``outbox.jsonl``.

One JSON object per line, oldest first: points, tags, artifacts (by a path relative to the run's folder), the
closing status. It only grows, but for a resume, which cuts off the lines of a future that it lives again. How
far it was delivered, and to which MLflow run, stands beside it in ``outbox.sent``. A process may die between
delivering lines and noting so: the same lines then go out again, with the timestamps they had.

Nothing in it is trusted: a line that is none of ours, or a path that leaves the run's folder, is refused.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import final

from cl_moe.errors import InputError
from cl_moe.tracking.entries import Batch, Counts, Entry, File, batches, from_line, to_line

OUTBOX = "outbox.jsonl"
SENT = "outbox.sent"
RUN_ID_FILE = "mlflow_run_id"
_MAX_LINE = 100_000  # bytes


@final
class Outbox:
    """The outbox of one run's folder. Nothing is written before there is something to write.

    Args:
        folder: the run's.
        run_id: of the MLflow run that it is delivered to. What was delivered to another one (which is gone,
            or the folder's id file was removed) waits again.
    """

    def __init__(self, folder: Path, run_id: str) -> None:
        self.folder, self.run_id = folder, run_id
        self.file, self._sent_file = folder / OUTBOX, folder / SENT
        self.length = self._whole_lines()  # bytes; a line that a killed process left half written is not ours
        self.sent = min(self._read_sent(), self.length)

    def append(self, entries: Iterable[Entry], *, durable: bool = False) -> None:
        """Adds lines; ``durable`` waits until they, and those before, are on the disk.

        Raises:
            OSError: the disk is full, say; the file then holds none of them.
        """
        content = "".join(map(to_line, entries)).encode()
        if not content and not (durable and self.file.exists()):
            return
        fresh = not self.file.exists()
        with self.file.open("wb" if fresh else "r+b") as file:
            file.truncate(self.length)  # whatever a killed process or a full disk left behind the last line
            file.seek(self.length)
            file.write(content)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        if fresh and durable:
            _sync_folder(self.folder)
        self.length += len(content)

    def cut(self, length: int) -> int:
        """Keeps the first ``length`` bytes, whole lines only, and forgets what was delivered behind them.

        Returns:
            The bytes that there are now: fewer if the file was shorter or has no line that ends there.
        """
        length = self._whole_lines(length)
        if self.sent > length:  # first: new lines must never stand where delivered ones are noted
            self.sent = length
            self._write_sent(durable=True)
        if self.file.exists():
            os.truncate(self.file, length)
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
        try:
            self._write_sent(durable=False)
        except OSError:
            self._sent_file.with_name(f"{SENT}.part").unlink(missing_ok=True)

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
        with self.file.open("rb") as file:
            file.seek(begin)
            while begin < end:
                line = file.readline(_MAX_LINE)
                entry = self._parse(line, begin)
                begin += len(line)
                yield entry, begin

    def _whole_lines(self, limit: int | None = None) -> int:
        """Bytes up to the end of the last whole line that ends at ``limit`` or before."""
        try:
            end = self.file.stat().st_size
        except FileNotFoundError:
            return 0
        end = end if limit is None else min(end, limit)
        with self.file.open("rb") as file:
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
            noted = json.loads(self._sent_file.read_bytes()[:_MAX_LINE])
            sent = noted["bytes"] if noted["run_id"] == self.run_id else 0
        except (OSError, ValueError, RecursionError, KeyError, TypeError):
            return 0  # unknown: to deliver twice is harmless
        if type(sent) is not int or not 0 <= sent <= self.length:
            return 0 if type(sent) is not int or sent < 0 else self.length
        return self._whole_lines(sent)

    def _write_sent(self, *, durable: bool) -> None:
        part = self._sent_file.with_name(f"{SENT}.part")
        part.unlink(missing_ok=True)
        with part.open("x") as file:
            file.write(json.dumps({"run_id": self.run_id, "bytes": self.sent}) + "\n")
            file.flush()
            if durable:
                os.fsync(file.fileno())
        part.replace(self._sent_file)
        if durable:
            _sync_folder(self.folder)

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
    file = folder / RUN_ID_FILE
    text = file.read_text(errors="replace").strip() if file.is_file() else ""
    if not re.fullmatch("[0-9a-f]{32}", text):
        raise InputError(
            got=f"{text[:40]!r} in {file}", allowed="an MLflow run id, 32 hexadecimal digits", key=str(file)
        )
    return text


def undelivered(folder: Path) -> bool:
    """Whether the folder of a run holds what its MLflow run has not got. Asks nobody but the folder."""
    if not (folder / OUTBOX).is_file():
        return False
    try:
        outbox = Outbox(folder, read_run_id(folder))
    except InputError:  # it shall have a new MLflow run, or does not know its own
        return True
    return outbox.sent < outbox.length


def _sync_folder(folder: Path) -> None:
    """Makes a rename or a new file last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
