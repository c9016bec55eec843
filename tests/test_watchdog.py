"""A hung run ends and says where it hung; one that moves, however slowly, is left alone."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient

from cl_moe import checkpoint
from cl_moe.errors import RunFailedError
from cl_moe.tracking import artifacts, figures
from cl_moe.watchdog import TICKS, Looks, Watchdog

MOMENT = 0.001  # minutes: of a test that hangs on purpose


def alarm() -> object:
    return signal.getsignal(signal.SIGALRM)


def wait_for_ever() -> None:
    threading.Event().wait()


def test_whoever_hangs_is_interrupted_and_named() -> None:
    before, threads = alarm(), threading.active_count()
    with pytest.raises(RunFailedError) as caught, Watchdog(MOMENT):
        wait_for_ever()
    message = str(caught.value)
    assert "nothing ended for 0.001 minutes" in message
    assert "it waits in Condition.wait (" in message, "the innermost frame"
    assert f"called from wait_for_ever ({__file__}:" in message, "and the first that is no library's"
    assert "trainer.stall_minutes" in message
    assert (alarm(), threading.active_count()) == (before, threads), "nothing is left behind"


def test_only_looks_in_a_row_without_progress_count() -> None:
    looks = Looks()
    silence = [looks.look(1) for _ in range(TICKS)]
    assert silence == ["wait"] * TICKS, "the first of them saw progress"
    assert looks.look(2) == "wait"
    assert [looks.look(2) for _ in range(2 * TICKS)] == [
        *["wait"] * (TICKS - 1),
        "ask",
        *["wait"] * (TICKS - 1),
        "end",
    ]
    assert looks.look(3) == "wait", "whoever goes on after all is left alone"


def test_a_step_between_the_look_and_the_interruption_is_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """The main thread is asked, and moves before it hears of it."""
    handled: list[object] = []
    moved = threading.Event()
    describe, interrupt = Watchdog._describe, Watchdog._raise

    def describe_and_move(self: Watchdog) -> str:
        text = describe(self)
        self.alive()  # as late as can be: the look was taken, the signal comes next
        return text

    def interrupted(self: Watchdog, *rest: object) -> None:
        interrupt(self, *rest)
        handled.append(rest)
        moved.set()

    monkeypatch.setattr(Watchdog, "_describe", describe_and_move)
    monkeypatch.setattr(Watchdog, "_raise", interrupted)
    with Watchdog(MOMENT):
        moved.wait()
    assert handled, "the interruption came, and raised nothing"


def test_without_minutes_or_outside_the_main_thread_nothing_is_watched() -> None:
    before, seen = alarm(), []

    def enter() -> None:
        with Watchdog(MOMENT) as watchdog:
            watchdog.alive()
            seen.append((alarm(), [thread.name for thread in threading.enumerate()]))

    with Watchdog(None):
        enter_elsewhere = threading.Thread(target=enter)
        assert "watchdog" not in [thread.name for thread in threading.enumerate()]
        enter_elsewhere.start()
        enter_elsewhere.join()
    assert [handler for handler, _ in seen] == [before]
    assert "watchdog" not in seen[0][1]


DEAF = f"""
import signal, threading
from cl_moe.watchdog import Watchdog
with Watchdog({MOMENT}):
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])  # as foreign code that never returns
    threading.Event().wait()
"""


def test_a_main_thread_that_cannot_be_interrupted_ends_with_the_process() -> None:
    done = subprocess.run([sys.executable, "-c", DEAF], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "it waits in Condition.wait (" in done.stderr
    assert "could not be interrupted" in done.stderr
    assert "resume=" in done.stderr
    assert "Traceback" not in done.stderr


BLOCKING = '''
"""Two experiences of digits; a batch of the second waits for ever while the file ``gate`` exists."""
import dataclasses
import os
import threading

from torch.utils.data import TensorDataset

from cl_moe.stream import Stream
from tasks.split_digits import split_digits


class Blocking(TensorDataset):
    def __getitem__(self, rows):
        if os.path.exists("gate"):
            threading.Event().wait()
        return super().__getitem__(rows)


def blocking_digits() -> Stream:
    whole = split_digits(tune_on_first=2)
    first, second = whole.experiences
    slow = dataclasses.replace(second, train=Blocking(*second.train.tensors))
    return dataclasses.replace(whole, experiences=(first, slow))
'''
YAML = """# @package _global_
defaults:
  - override /model: mlp
stream:
  _target_: blocking_digits.blocking_digits
"""


def test_a_stream_that_hangs(command_in: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the command line: status 1, said where, kept, and gone on with to the same bits."""
    (tmp_path / "blocking_digits.py").write_text(BLOCKING)
    (tmp_path / "mine/stream").mkdir(parents=True)
    (tmp_path / "mine/stream/blocking.yaml").write_text(YAML)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(figures, "write_figures", lambda record, folder: [])
    words = ("--config-dir", "mine", "stream=blocking", "trainer.epochs=1", "trainer.stall_minutes=0.1")
    assert command_in(tmp_path, *words, "hydra.run.dir=undisturbed", "tracking=none").status == 0

    (tmp_path / "gate").touch()
    hung = command_in(tmp_path, *words, "hydra.run.dir=out")
    assert hung.status == 1, hung.text
    assert "nothing ended for 0.1 minutes while training: the run hangs" in hung.text
    assert f"called from Blocking.__getitem__ ({tmp_path / 'blocking_digits.py'}:" in hung.text
    assert "kept: the state after experience 1" in hung.text
    assert "Traceback" not in hung.text
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert (run.info.status, run.data.tags["status"]) == ("FAILED", "failed")
    assert "the run hangs" in run.data.tags["failure"]

    (tmp_path / "gate").unlink()
    done = command_in(tmp_path, "resume=out")
    assert done.status == 0, done.text
    matrices = [(tmp_path / name / artifacts.MATRIX).read_bytes() for name in ("out", "undisturbed")]
    assert matrices[0] == matrices[1]
    assert checkpoint.newest(tmp_path / "out/checkpoints") is not None


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "soon", "true"])
def test_an_impossible_time_is_refused(command: Callable, minutes: str) -> None:
    done = command(f"trainer.stall_minutes={minutes}", "tracking=none")
    assert done.status == 2, done.text
    assert "change: trainer.stall_minutes" in done.text
