"""Not a test: a run of cl-moe that kills itself, with SIGKILL, at a chosen moment.

Run by ``test_resume.py`` through ``runpy`` with the globals FOLDER, ARGUMENTS, PLACE, COUNT.
"""

# ruff: noqa: F821 - its globals are given
from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

from cl_moe import checkpoint, cli, experiment
from cl_moe.learner import Learner
from cl_moe.tracking import figures
from cl_moe.tracking.tracker import MLflowTracker

PLACES = {
    "saving": (checkpoint, "save"),
    "training": (Learner, "training_step"),
    "evaluating": (Learner, "test_step"),
    "sending": (MLflowTracker, "_send"),
    "growing": (experiment, "adapt"),
    "drawing": (figures, "write_figures"),
    "closing": (MLflowTracker, "finish"),
}


def arm(place: str, count: int) -> None:
    """Die in the ``count``-th call of a place: "before ..." as it begins, "after ..." as it ends."""
    moment, _, name = place.partition(" ")
    owner, attribute = PLACES[name]
    original, calls = getattr(owner, attribute), []

    def deadly(*args: object, **kwargs: object) -> object:
        calls.append(1)
        if len(calls) == count and moment == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, attribute, deadly)


def half_write(count: int) -> None:
    """Die while the ``count``-th checkpoint is half on the disk, under its temporary name."""
    original, calls = checkpoint.write_atomically, []

    def deadly(path: Path, content: bytes) -> None:
        calls.extend([1] if path.name.startswith("boundary_") else [])
        if len(calls) == count:
            path.with_name(f".{path.name}.{os.getpid()}").write_bytes(content[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        original(path, content)

    checkpoint.write_atomically = deadly


os.chdir(FOLDER)
if PLACE == "within saving":
    half_write(COUNT)
elif PLACE != "never":
    arm(PLACE, COUNT)
with open("log.txt", "w") as log, contextlib.redirect_stderr(log), contextlib.redirect_stdout(log):
    cli.main(ARGUMENTS)
