"""What a run was made with, so that it can be made again: machine, versions, code, data."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import zlib
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import cl_moe
from cl_moe.files import write_atomically

ENVIRONMENT, RESUMED = "environment.txt", "environment_resumed.txt"
DIFF, DATA = "git.diff", "data.json"
_MOST_BYTES = 1_000_000  # of a diff
_SECONDS = 10.0  # that git may take


def write_environment(path: Path) -> Path:
    """``environment`` as a file, whole or not at all."""
    write_atomically(path, environment().encode())
    return path


def write_resumed(folder: Path) -> str:
    """Write the environment of a run that goes on in another one than it began in.

    Returns:
        What differs, in a few words; empty if nothing does, and then nothing is written.
    """
    changes = list(environment_changes((folder / ENVIRONMENT).read_text(encoding="utf-8")))
    if not changes:
        return ""
    write_environment(folder / RESUMED)
    more = f", and {len(changes) - 2} more" if len(changes) > 2 else ""
    return "; ".join(changes[:2]) + more


def environment_changes(text: str) -> Iterator[str]:
    """In what the environment of now differs from one that ``environment`` described, a line each."""
    old, new = _named(text), _named(environment())
    for name in dict.fromkeys((*old, *new)):
        if old.get(name) != new.get(name):
            yield f"{name} was {old.get(name, 'not there')}, is {new.get(name, 'not there')}"


def environment() -> str:
    """Python, platform, processor, threads, commit and the versions of everything installed, line by line.

    Neither the user's name nor a path.
    """
    packages = _packages()
    commit, dirty = checkout()
    lines = [
        f"python {platform.python_version()} ({platform.python_implementation()})",
        f"platform {platform.system()} {platform.release()} {platform.machine()}",
        f"processor {_processor()}",
        f"cores {os.cpu_count()}",
        f"threads {torch.get_num_threads()}",
        *(f"gpu {torch.cuda.get_device_name(index)}" for index in range(torch.cuda.device_count())),
        f"commit {commit}{' (changed)' if dirty == 'true' else ''}",
        *(f"{name}=={packages[name]}" for name in sorted(packages, key=str.lower)),
    ]
    return "\n".join(lines) + "\n"


def checkout() -> tuple[str, str]:
    """Commit of the program's checkout and whether it was changed since; ``unknown`` outside one."""
    try:
        if Path(_git("rev-parse", "--show-toplevel").decode().strip()).resolve() != _home():
            return "unknown", "unknown"
        return _git("rev-parse", "HEAD").decode().strip(), str(bool(_git("status", "--porcelain"))).lower()
    except (OSError, subprocess.SubprocessError):
        return "unknown", "unknown"


def diff() -> bytes:
    """How the tracked files of the program's checkout differ from its commit; empty outside a checkout.

    Nothing outside the checkout is read, and no file that git does not track. At most a megabyte: a longer
    one is cut behind a line, and says so.
    """
    if checkout()[1] != "true":
        return b""
    try:
        # not as the user has git set up: no colours, no programs of theirs
        text = _git("-c", "core.pager=cat", "diff", "--no-color", "--no-ext-diff", "--no-textconv", "HEAD")
    except (OSError, subprocess.SubprocessError):
        return b""
    if len(text) <= _MOST_BYTES:
        return text
    return text[: text.rfind(b"\n", 0, _MOST_BYTES) + 1] + f"[cut: {len(text)} bytes]\n".encode()


def write_data(fingerprint: Mapping[str, Any], path: Path) -> Path:
    """CRC-32 of every tensor of a stream, by experience, so that two runs can tell whether they had the same.

    Args:
        fingerprint: of a run: in ``stream`` the stream's name, then for each experience its name and the
            checksums of its parts; in ``held_out`` the same of each held-out text.
        path: of the file.
    """
    write_atomically(path, data_text(fingerprint).encode())
    return path


def data_text(fingerprint: Mapping[str, Any]) -> str:
    """What ``write_data`` writes."""
    name, *experiences = fingerprint["stream"]
    told = {"stream": name, "experiences": experiences}
    if fingerprint.get("held_out"):
        told["held_out"] = fingerprint["held_out"]
    return f"{json.dumps(told, indent=1)}\n"


def data_checksum(fingerprint: Mapping[str, Any]) -> str:
    """The same in one word, a tag: runs of one order and data seed that differ in it are never averaged.

    >>> one, two = ({"stream": ["digits", ["zeros", 1, last]]} for last in (2, 3))
    >>> data_checksum(one) == data_checksum(two)
    False
    >>> data_checksum(one) == data_checksum({**one, "held_out": [["bible", 7]]})
    False
    """
    told = [*fingerprint["stream"], *fingerprint.get("held_out", ())]
    return f"{zlib.crc32(json.dumps(told).encode()):08x}"


@cache
def _packages() -> Mapping[str, str]:
    """Versions of all that is installed, by name; read once, which takes a third of a second."""
    abouts = (distribution.metadata for distribution in metadata.distributions())
    return {about["Name"]: about["Version"] for about in abouts if about["Name"]}


def _named(text: str) -> dict[str, str]:
    """``{"python": "3.12.1 (CPython)", "numpy": "2.1.0"}`` of an environment's lines."""
    pairs = (line.partition("==" if "==" in line else " ") for line in text.splitlines())
    return {name: value for name, _, value in pairs}


def _git(*words: str) -> bytes:
    done = subprocess.run(
        ["git", "-C", str(_home()), *words], capture_output=True, check=True, timeout=_SECONDS
    )
    return done.stdout


def _home() -> Path:
    return Path(cl_moe.__file__).resolve().parents[1]


def _processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or "unknown"
