"""An outbox that somebody removes, cuts, or has planted a link for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cl_moe.errors import InputError
from cl_moe.tracking.entries import Entry, Point, to_line
from cl_moe.tracking.outbox import OUTBOX, RUN_ID_FILE, SENT, Outbox, read_run_id, undelivered

RUN = "0123456789abcdef" * 2


def points(*steps: int) -> list[Entry]:
    return [Point("train/loss", step / 7, 1000 + step, step) for step in steps]


def held(outbox: Outbox) -> list[Entry]:
    return [entry for batch in outbox.waiting() for entry in batch.entries]


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    """A file outside the folder of any run."""
    file = tmp_path / "precious"
    file.write_text("mine\n")
    return file


def test_a_note_is_never_written_through_a_link(tmp_path: Path, precious: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for name in (SENT, f".{SENT}.{os.getpid()}"):
        (folder / name).symlink_to(precious)
    outbox = Outbox(folder, RUN)
    outbox.append(points(0))
    outbox.note_sent(outbox.length)
    assert precious.read_text() == "mine\n"
    assert held(Outbox(folder, RUN)) == []


@pytest.mark.parametrize("dangling", [False, True])
@pytest.mark.parametrize("when", ["before", "in mid-run"])
def test_an_outbox_that_is_a_link_is_refused(
    when: str, dangling: bool, tmp_path: Path, precious: Path
) -> None:
    folder, target = tmp_path / "run", precious.with_name("nowhere") if dangling else precious
    folder.mkdir()
    outbox = Outbox(folder, RUN)
    if when == "in mid-run":
        outbox.append(points(0))
        outbox.file.unlink()
    outbox.file.symlink_to(target)
    for act in (lambda: Outbox(folder, RUN), lambda: outbox.append(points(1)), lambda: outbox.cut(3)):
        with pytest.raises(InputError) as caught:
            act()
        assert caught.value.key == str(folder / OUTBOX)
    assert (precious.read_text(), target.exists()) == ("mine\n", not dangling)


@pytest.mark.parametrize("name", [OUTBOX, SENT, RUN_ID_FILE])
def test_a_pipe_is_not_waited_for(name: str, tmp_path: Path) -> None:
    Outbox(tmp_path, RUN).append(points(0))
    (tmp_path / RUN_ID_FILE).write_text(RUN)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    if name == SENT:
        assert undelivered(tmp_path)
    else:
        with pytest.raises(InputError, match=name):
            Outbox(tmp_path, read_run_id(tmp_path))


@pytest.mark.parametrize("keep", [None, 0, 1, 1.5])
@pytest.mark.parametrize("sent", [0, 1, 3])
def test_an_outbox_that_shrinks_in_mid_run_goes_on(
    keep: float | None, sent: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    outbox, line = Outbox(tmp_path, RUN), len(to_line(points(0)[0]))
    outbox.append(points(0, 1, 2))
    outbox.note_sent(sent * line)
    if keep is None:
        outbox.file.unlink()
    else:
        os.truncate(outbox.file, int(keep * line))
    outbox.append(points(3), durable=True)
    outbox.append(points(4))
    left = [step for step in range(int(keep or 0)) if step >= sent]
    assert held(outbox) == points(*left, 3, 4) == held(Outbox(tmp_path, RUN))
    assert b"\0" not in outbox.file.read_bytes()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert str(outbox.file) in caplog.text


def test_a_loss_is_noticed_when_nothing_is_new(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    outbox = Outbox(tmp_path, RUN)
    outbox.append(points(0))
    outbox.file.unlink()
    outbox.append([], durable=True)
    assert outbox.length == 0
    assert "removed or cut" in caplog.text


def test_what_is_noted_as_sent_follows_a_cut_that_failed_at_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    outbox = Outbox(tmp_path, RUN)
    outbox.append(points(0, 1))
    outbox.note_sent(outbox.length)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="space"):
            outbox.cut(0)
    outbox.cut(0)
    outbox.append(points(5, 6))
    assert held(Outbox(tmp_path, RUN)) == points(5, 6)
