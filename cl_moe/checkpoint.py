"""Checkpoints at the boundaries between experiences: atomic, verified, plain.

A checkpoint is one file, ``boundary_003-<digest>.pt``: written beside its name, flushed to the disk, renamed.
The name carries the first 16 hexadecimal digits of the SHA-256 of its content, so a file that was cut or
flipped is noticed before it is read. It holds tensors and plain Python, and loads with ``weights_only=True``.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
from pathlib import Path
from typing import Any

import torch

from cl_moe.errors import InputError

FORMAT = 1
NAME = re.compile(r"boundary_(\d+)-([0-9a-f]{16})\.pt")
log = logging.getLogger(__name__)


def save(folder: Path, boundary: int, state: dict[str, Any], keep: int) -> Path:
    """Write the state after ``boundary`` experiences; then let go of all but the newest ``keep``.

    Files of this boundary or a later one that stand there already were passed over when the run was resumed:
    they are bad or of another future, and go first, so that they never push out a good one.
    """
    check_keep(keep)
    folder.mkdir(parents=True, exist_ok=True)
    for half_written in folder.glob(".boundary_*.pt.*"):  # of a process that was killed; there is one writer
        half_written.unlink()
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, "boundary": boundary, **state}, buffer)
    content = buffer.getbuffer()
    path = folder / f"boundary_{boundary:03d}-{_digest(content)}.pt"
    write_atomically(path, content)
    others = [other for other in _candidates(folder) if other != path]
    past = [other for other in others if _boundary(other) < boundary]
    for old in [*(other for other in others if other not in past), *past[keep - 1 :]]:
        old.unlink()
    return path


def check_keep(keep: int) -> None:
    """Refuse to keep none."""
    if not isinstance(keep, int) or keep < 1:
        raise InputError(
            got=f"keep_checkpoints={keep}", allowed="a whole number, at least 1", key="keep_checkpoints"
        )


def newest(folder: Path) -> dict[str, Any] | None:
    """The newest good checkpoint; a bad one is passed over with a warning. None where there never was one.

    Raises:
        InputError: there are checkpoints, and none of them is good.
    """
    candidates = _candidates(folder)
    for path in candidates:
        state = _read(path)
        if state is not None:
            return state
    if candidates:
        raise InputError(
            got=f"{len(candidates)} checkpoints in {folder}, none of them readable",
            allowed="at least one whole checkpoint of this version",
            key="resume",
        )
    return None


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """A file that is there whole or not at all, also after a power cut."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _candidates(folder: Path) -> list[Path]:
    """Checkpoints by name, newest first."""
    found = [path for path in folder.glob("boundary_*.pt") if NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: (_boundary(path), path.name), reverse=True)


def _boundary(path: Path) -> int:
    return int(path.name.removeprefix("boundary_").split("-")[0])


def _read(path: Path) -> dict[str, Any] | None:
    content = path.read_bytes()
    match = NAME.fullmatch(path.name)
    assert match is not None
    if _digest(content) != match[2]:
        log.warning("%s is damaged (its content does not match its name): going back to the one before", path)
        return None
    try:
        state = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
    except Exception as error:  # torch names no common base: a refused pickle, a foreign or broken archive
        log.warning("%s cannot be read (%s): going back to the one before", path, type(error).__name__)
        return None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        log.warning("%s is of another version: going back to the one before", path)
        return None
    return state


def _digest(content: bytes | memoryview) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
