"""A request to stop: noted or obeyed, never lost, and not taken for a failure."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from cl_moe import launch, stopping
from cl_moe.errors import InputError, RunFailedError, StopRequestedError
from cl_moe.progress import StreamProgress


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def test_at_once_where_nothing_can_be_saved():
    with stopping.listening():
        with pytest.raises(StopRequestedError) as stopped:
            send(signal.SIGTERM)
        assert not stopped.value.keyboard
    with stopping.listening(), pytest.raises(KeyboardInterrupt):
        send(signal.SIGINT)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_obeys_where_it_can_save(number: int, capsys: pytest.CaptureFixture[str]):
    with stopping.listening(), stopping.deferring():
        stopping.obey()
        assert not stopping.asked()
        send(number)
        assert stopping.asked()
        with pytest.raises(StopRequestedError) as stopped:
            stopping.obey()
    assert stopped.value.keyboard == (number == signal.SIGINT)
    assert "when this step is done" in capsys.readouterr().err


def test_a_second_ctrl_c_does_not_wait_and_a_second_sigterm_does():
    with stopping.listening(), stopping.deferring():
        send(signal.SIGTERM)
        send(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_handlers_are_given_back_and_nothing_stays_noted():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with stopping.listening(), stopping.deferring():
        send(signal.SIGTERM)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert not stopping.asked()


def test_another_thread_hears_nothing():
    found = []

    def listen() -> None:
        before = signal.getsignal(signal.SIGTERM)
        with stopping.listening():
            found.append(signal.getsignal(signal.SIGTERM) is before)

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert found == [True]


def interrupted(inner: BaseException, outer: Exception) -> Exception:
    try:
        try:
            raise inner
        finally:
            raise outer
    except Exception as error:
        return error


def test_a_clean_up_that_failed_does_not_hide_the_request():
    stop = StopRequestedError()
    assert stopping.behind(interrupted(stop, AttributeError("of a half-made object"))) is stop
    for named in (RunFailedError("disk full"), InputError(got="1", allowed="2", key="3")):
        error = interrupted(stop, named)
        assert stopping.behind(error) is error
    plain = ValueError()
    assert stopping.behind(plain) is plain


@pytest.mark.parametrize("words", [(), ("-m", "seed.init=0,1")])
def test_a_stop_that_was_hidden_ends_with_its_status(
    words: tuple[str, ...], command: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def broken(*_: object) -> None:
        raise interrupted(StopRequestedError(), AttributeError("of a half-made object"))

    monkeypatch.setattr(launch, "build", broken)
    done = command(*words, "tracking=none", "hydra.run.dir=out", "hydra.sweep.dir=sweep")
    assert done.status == 75
    assert done.text.splitlines()[-1] == "stopped on request while starting; the same command starts again"
    assert "failed" not in done.text


class Gone(io.StringIO):
    """An output whose reader went away."""

    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_a_request_is_noted_when_nobody_reads_the_output(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stderr", Gone())
    with stopping.listening(), stopping.deferring():
        send(signal.SIGTERM)
        assert stopping.asked()


def test_a_run_goes_on_when_nobody_reads_its_progress(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stderr", Gone())
    progress = StreamProgress(["a", "b"], [2, 2])
    with progress:
        for index in range(2):
            progress.open(index)
            progress.say("one line")
            progress.tick()
        progress.console.print("a table")
    assert progress.done == 3


def test_names_are_shown_as_they_are():
    drawn = io.StringIO()
    progress = StreamProgress(
        ["[/b] :cat:"], [2], Console(file=drawn, force_terminal=True, width=100, emoji=False)
    )
    with progress:
        progress.open(0)
        progress.say("[/b] :dog:")
    assert "experience 1/1 [/b] :cat:" in drawn.getvalue()
    assert "[/b] :dog:" in drawn.getvalue()
    assert StreamProgress(["a"], [1]).console.render_str(":cat:").plain == ":cat:"
