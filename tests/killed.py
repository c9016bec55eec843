"""Not a test: a run of cl-moe that sends itself a signal, SIGKILL say, at a chosen moment.

Run by ``test_resume.py`` through ``runpy`` with the globals FOLDER, ARGUMENTS, PLACE, COUNT, SIGNAL.
"""

# ruff: noqa: F821 - its globals are given
from __future__ import annotations

import contextlib
import io
import os
import signal
from typing import IO

import torch

from cl_moe import checkpoint, cli, experiment
from cl_moe.learner import Learner
from cl_moe.tracking import figures
from cl_moe.tracking.tracker import MLflowTracker

PLACES = {
    "saving": (checkpoint.Checkpoints, "save"),
    "training": (Learner, "training_step"),
    "evaluating": (Learner, "test_step"),
    "sending": (MLflowTracker, "_send"),
    "growing": (experiment, "adapt"),
    "drawing": (figures, "write_figures"),
    "closing": (MLflowTracker, "finish"),
}


def arm(place: str, count: int) -> None:
    """The signal in the ``count``-th call of a place: "before ..." as it begins, "after ..." as it ends,
    "around ..." both.
    """
    moment, _, name = place.partition(" ")
    owner, attribute = PLACES[name]
    original, calls = getattr(owner, attribute), []

    def deadly(*args: object, **kwargs: object) -> object:
        calls.append(1)
        if len(calls) == count and moment in ("before", "around"):
            os.kill(os.getpid(), SIGNAL)
        result = original(*args, **kwargs)
        if len(calls) == count and moment in ("after", "around"):
            os.kill(os.getpid(), SIGNAL)
        return result

    setattr(owner, attribute, deadly)


def half_write(count: int) -> None:
    """Die while the ``count``-th checkpoint is half on the disk, under its temporary name."""
    original, calls = torch.save, []

    def deadly(state: object, file: IO[bytes]) -> None:
        calls.append(1)
        if len(calls) == count:
            original(state, whole := io.BytesIO())
            file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        original(state, file)

    checkpoint.torch.save = deadly


os.chdir(FOLDER)
if PLACE == "within saving":
    half_write(COUNT)
elif PLACE != "never":
    arm(PLACE, COUNT)
with open("log.txt", "w") as log, contextlib.redirect_stderr(log), contextlib.redirect_stdout(log):
    cli.main(ARGUMENTS)
