"""Checkpoints at the boundaries between experiences and inside them: atomic, verified, plain.

A checkpoint is one file, ``boundary_003-<digest>.pt`` or, inside the experience after that boundary,
``boundary_003_batch_00000120-<digest>.pt``: written under another name, flushed to the disk, renamed. The
digest is the first 16 hexadecimal digits of the SHA-256 of the content, so a file that was cut or flipped is
noticed before it is read. It holds tensors and plain Python, and loads with ``weights_only=True``.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch

from cl_moe import failures
from cl_moe.errors import InputError
from cl_moe.files import whole_or_not

FORMAT = 3
NAME = re.compile(r"boundary_(\d+)(?:_batch_(\d+))?-([0-9a-f]{16})\.pt")
INSIDE = 2  # checkpoints kept inside an experience: the newest, and one to fall back on
State = dict[str, Any]
log = logging.getLogger(__name__)


class Moment(NamedTuple):
    """A place in a stream: ``batches`` of training after ``boundary`` experiences; with 0, the boundary."""

    boundary: int
    batches: int = 0

    def __str__(self) -> str:
        inside = f"_batch_{self.batches:08d}" if self.batches else ""
        return f"boundary_{self.boundary:03d}{inside}"


@dataclass(frozen=True)
class Branch:
    """Where a child run starts from.

    Args:
        folder: of the parent run.
        boundary: number of experiences the parent had been trained on.
    """

    folder: Path
    boundary: int


class Checkpoints:
    """When to save inside an experience, and what is kept: the ``checkpoint`` node of the configuration.

    Args:
        every_steps: optimizer steps between two checkpoints inside an experience; None for none by steps.
        every_minutes: minutes between two of them; None for none by time.
        keep: newest boundaries kept, beside the best (highest mean score over the whole stream's test data);
            None keeps all, so that any of them can be branched from.
        model_mb: the model of a finished run is written into its folder ``model`` (and to MLflow) if its
            weights take at most so many megabytes; 0 for never, None for any size.
    """

    def __init__(
        self,
        every_steps: int | None = None,
        every_minutes: float | None = 10.0,
        keep: int | None = None,
        model_mb: float | None = 200.0,
    ) -> None:
        for name, count in (("every_steps", every_steps), ("keep", keep)):
            if count is not None and (not isinstance(count, int) or count < 1):
                raise InputError(
                    got=f"{name}={count!r}",
                    allowed="a whole number, at least 1, or null",
                    key=f"checkpoint.{name}",
                )
        if every_minutes is not None and not 0 < every_minutes < math.inf:
            raise InputError(
                got=f"every_minutes={every_minutes!r}",
                allowed="above 0, or null",
                key="checkpoint.every_minutes",
            )
        if model_mb is not None and not 0 <= model_mb < math.inf:
            raise InputError(
                got=f"model_mb={model_mb!r}", allowed="at least 0, or null", key="checkpoint.model_mb"
            )
        self.every_steps, self.every_minutes, self.keep = every_steps, every_minutes, keep
        self.model_mb = model_mb
        self._steps, self._since = 0, time.monotonic()

    def due(self) -> bool:
        """Whether it is time to save, now that one more optimizer step is done."""
        self._steps += 1
        if self.every_steps is not None and self._steps >= self.every_steps:
            return True
        return self.every_minutes is not None and time.monotonic() - self._since >= 60 * self.every_minutes

    def began_anew(self) -> None:
        """Something was saved just now, by this process or by the one that saves for it."""
        self._steps, self._since = 0, time.monotonic()

    def save(self, folder: Path, moment: Moment, state: State, best: int) -> Path:
        """Write a checkpoint; then let go of what it makes superfluous. ``best``: a boundary to be kept."""
        path = save(folder, moment, state)
        self.began_anew()
        for old in self._superfluous(path, best):
            old.unlink()
        for other in _candidates(folder):
            if _moment(other) > moment:  # passed over by a resume: bad, of another version or another future
                other.rename(other.with_name(f"{other.name}.passed_over"))
        return path

    def _superfluous(self, newest: Path, best: int) -> Iterator[Path]:
        now, inside, boundaries = _moment(newest), 1, 0
        for path in _candidates(newest.parent):
            moment = _moment(path)
            if path == newest:
                boundaries += not moment.batches
            elif moment == now:
                yield path
            elif moment > now:
                continue
            elif moment.batches:
                inside += 1
                if moment.boundary < now.boundary or inside > INSIDE:
                    yield path
            else:
                boundaries += 1
                if self.keep is not None and boundaries > self.keep and moment.boundary != best:
                    yield path


def save(folder: Path, moment: Moment, state: State) -> Path:
    """Write the state of a moment, whole or not at all, and return the file."""
    folder.mkdir(parents=True, exist_ok=True)
    for half_written in folder.glob(".boundary_*"):  # of a process that was killed; there is one writer
        half_written.unlink()
    with whole_or_not(folder / f".{moment}.{os.getpid()}") as (file, rename):
        hashing = _Hashing(file)
        whole = {"format": FORMAT, "boundary": moment.boundary, "batches": moment.batches, **state}
        torch.save(whole, hashing)  # type: ignore[arg-type]
        return rename(folder / f"{moment}-{hashing.digest}.pt")


def newest(folder: Path, refuse: Callable[[State], str | None] = lambda state: None) -> State | None:
    """The newest good checkpoint; a bad one is passed over with a warning. None where there never was one.

    Args:
        folder: of the checkpoints.
        refuse: says what is wrong with a state that was read well, or None.

    Raises:
        InputError: there are checkpoints, and none of them is good.
    """
    candidates = _candidates(folder)
    for path in candidates:
        state = _read(path, refuse)
        if state is not None:
            return state
    if candidates:
        raise InputError(
            got=f"{len(candidates)} checkpoints in {folder}, none of them good",
            allowed="at least one whole checkpoint of this version and this run",
            key="resume",
        )
    return None


def boundaries(folder: Path) -> list[int]:
    """The boundaries that a run's folder holds checkpoints of, ascending."""
    moments = [_moment(path) for path in _candidates(folder / "checkpoints")]
    return sorted({moment.boundary for moment in moments if not moment.batches})


def at(branch: Branch, refuse: Callable[[State], str | None], key: str = "branch") -> State:
    """The state that a branch starts from; ``key`` names it.

    Raises:
        InputError: there is no such boundary, or it is not good.
    """
    found = _candidates(branch.folder / "checkpoints")
    chosen = [path for path in found if _moment(path) == Moment(branch.boundary)]
    for path in chosen:
        if (state := _read(path, refuse)) is not None:
            return state
    numbers = ", ".join(map(str, boundaries(branch.folder))) or "none"
    raise InputError(
        got=f"{Moment(branch.boundary)} of {branch.folder}, which is {'not good' if chosen else 'not there'}",
        allowed=f"boundaries that were kept ({numbers}), of the same stream and the same model",
        key=f"{key} (or the parent's checkpoint.keep)",
    )


class _Hashing:
    """A file that knows the digest of what was written, so that no second copy is held in memory."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self._hash = file, hashlib.sha256()

    def write(self, content: bytes) -> int:
        """Write on; torch.save never goes back."""
        self._hash.update(content)
        return self.file.write(content)

    def flush(self) -> None:
        """As a file has it."""
        self.file.flush()

    @property
    def digest(self) -> str:
        """Of everything so far."""
        return self._hash.hexdigest()[:16]


def _candidates(folder: Path) -> list[Path]:
    """Checkpoints by name, newest first."""
    found = [path for path in folder.glob("boundary_*.pt") if NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: (_moment(path), path.name), reverse=True)


def _moment(path: Path) -> Moment:
    match = NAME.fullmatch(path.name)
    assert match is not None
    return Moment(int(match[1]), int(match[2] or 0))


def _read(path: Path, refuse: Callable[[State], str | None]) -> State | None:
    passed_over = "going back to the one before"
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        if not path.stem.endswith(f"-{digest}"):
            log.warning("%s is damaged (its content does not match its name): %s", path, passed_over)
            return None
        file.seek(0)
        try:
            state = torch.load(file, weights_only=True, map_location="cpu")
        except OSError:
            raise
        except Exception as error:  # torch has no common base for refused pickles and broken archives
            if failures.out_of_memory(error):
                raise
            log.warning("%s cannot be read (%s): %s", path, type(error).__name__, passed_over)
            return None
    if not isinstance(state, Mapping) or state.get("format") != FORMAT:
        log.warning("%s is of another version: %s", path, passed_over)
        return None
    if (state.get("boundary"), state.get("batches")) != _moment(path):
        log.warning("%s has another name than it was written under: %s", path, passed_over)
        return None
    if reason := refuse(dict(state)):
        log.warning("%s %s: %s", path, reason, passed_over)
        return None
    return dict(state)
