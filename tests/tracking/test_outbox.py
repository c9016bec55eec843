"""The outbox: whole lines, in order, cut where a checkpoint says; nothing in it is believed unread."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cl_moe.errors import InputError
from cl_moe.tracking.entries import Closing, Counts, Entry, File, Point, Tag, batches, from_line, to_line
from cl_moe.tracking.outbox import OUTBOX, RUN_ID_FILE, SENT, Outbox, undelivered

RUN = "0123456789abcdef" * 2
WHOLE = st.integers(-(2**63) + 1, 2**63 - 1)
REFUSED_TAGS = ["mlflow.runName", "mlflow.parentRunId", "mlflow.", "status", "output_dir", "start_token"]
MOMENT = st.integers(0, 2**63 - 1)
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)
ENTRIES = st.one_of(
    st.builds(Point, TEXT, st.floats(allow_nan=False), MOMENT, WHOLE),
    st.builds(Tag, TEXT.filter(lambda name: not name.startswith("mlflow.")), TEXT),
    st.builds(File, TEXT, TEXT),
    st.builds(Closing, st.sampled_from(["finished", "failed", "stopped"]), MOMENT),
)


def points(*steps: int) -> list[Entry]:
    return [Point("train/loss", step / 7, 1000 + step, step) for step in steps]


def held(outbox: Outbox) -> list[Entry]:
    return [entry for batch in outbox.waiting() for entry in batch.entries]


@given(ENTRIES)
def test_any_entry_reads_back(entry: Entry) -> None:
    line = to_line(entry)
    assert line.count("\n") == 1
    assert line.endswith("\n")
    assert from_line(line.encode()) == entry


@given(st.lists(ENTRIES, max_size=30))
def test_batches_keep_the_order_and_lose_nothing(entries: list[Entry]) -> None:
    cut = list(batches((entry, place + 1) for place, entry in enumerate(entries)))
    assert [entry for batch in cut for entry in batch.entries] == entries
    for batch in cut:
        assert len(batch.entries) == 1 or all(isinstance(entry, Point) for entry in batch.entries)
        assert entries[batch.end - 1] is batch.entries[-1]
    assert sum((Counts().plus(batch.entries)[0] for batch in cut), 0) == Counts().plus(entries).points


def test_no_batch_has_more_points_than_mlflow_takes(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path, RUN)
    outbox.append(points(*range(2500)))
    assert [len(batch.entries) for batch in outbox.waiting()] == [1000, 1000, 500]


@pytest.mark.parametrize(
    "line",
    [
        "", "{}", "[]", "3", "null", "not json", '["tag", "value"]', "[" * 50_000,
        '{"metric": "a", "value": 1, "ms": 1}',
        '{"metric": "a", "value": "1", "ms": 1, "step": 1}',
        '{"metric": "a", "value": NaN, "ms": 1, "step": 1}',
        '{"metric": "a", "value": true, "ms": 1, "step": 1}',
        '{"metric": "a", "value": 1, "ms": -1, "step": 1}',
        '{"metric": "a", "value": 1, "ms": 1.5, "step": 1}',
        '{"metric": "a", "value": 1, "ms": 1, "step": true}',
        '{"metric": "a", "value": 1, "ms": 1, "step": 9223372036854775808}',
        f'{{"metric": "a", "value": {"9" * 400}, "ms": 1, "step": 1}}',
        '{"metric": ["a"], "value": 1, "ms": 1, "step": 1}',
        '{"tag": "a", "value": 1}', '{"tag": "a", "value": "\\ud800"}', '{"tag": "a\\u0000", "value": "b"}',
        '{"tag": "a", "value": "b", "more": "c"}', '{"artifact": "a"}', '{"status": "won", "ms": 1}',
        f'{{"tag": "a", "value": "{"x" * 100_000}"}}',
        *(f'{{"tag": "{name}", "value": "b"}}' for name in REFUSED_TAGS),
    ],
)  # fmt: skip
def test_a_line_that_is_none_of_ours_is_refused(line: str, tmp_path: Path) -> None:
    good = to_line(Tag("a", "b"))
    (tmp_path / OUTBOX).write_text(f"{good}{line}\n{good}")
    outbox = Outbox(tmp_path, RUN)
    with pytest.raises(InputError, match=f"byte {len(good)} of"):
        outbox.check()


@pytest.mark.parametrize(
    ("name", "place"),
    [("/etc/hostname", ""), ("../other", ""), ("a/../../other", ""), ("out/secret", ""), ("link", ""),
     ("", ""), ("mine", "../.."), ("mine", "/top"), (".", "..")],
)  # fmt: skip
def test_a_file_that_leaves_the_folder_is_refused(name: str, place: str, tmp_path: Path) -> None:
    folder, other = tmp_path / "run", tmp_path / "elsewhere"
    folder.mkdir()
    other.mkdir()
    for file in (tmp_path / "other", other / "secret", folder / "mine"):
        file.write_text("x")
    (folder / "out").symlink_to(other)
    (folder / "link").symlink_to(other / "secret")
    outbox = Outbox(folder, RUN)
    with pytest.raises(InputError, match="inside the run's folder"):
        outbox.path(File(name, place))
    assert outbox.path(File("mine", "a/b")) == folder / "mine"
    assert outbox.path(File("gone", "")) is None


def test_what_was_delivered_does_not_wait(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path, RUN)
    outbox.append([*points(0, 1), Tag("a", "b"), *points(2)])
    first, *_ = outbox.waiting()
    outbox.note_sent(first.end)
    again = Outbox(tmp_path, RUN)
    assert held(again) == [Tag("a", "b"), *points(2)] == held(outbox)
    assert again.check() == Counts(points=1, tags=1)
    assert held(Outbox(tmp_path, "f" * 32)) == [
        *points(0, 1),
        Tag("a", "b"),
        *points(2),
    ]  # another MLflow run


def test_a_cut_goes_back_in_time(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path, RUN)
    outbox.append(points(0), durable=True)
    covered = outbox.length
    outbox.append(points(1, 2))
    outbox.note_sent(outbox.length)
    again = Outbox(tmp_path, RUN)
    assert again.cut(covered) == covered
    again.append(points(1))  # lived again, where delivered lines stood
    assert held(again) == points(1) == held(Outbox(tmp_path, RUN))
    assert again.cut(0) == 0
    assert held(again) == []


@pytest.mark.parametrize("torn", [b'{"metric"', b"\x00" * 5000, b"x" * 300_000])
def test_a_half_written_line_is_written_over(torn: bytes, tmp_path: Path) -> None:
    outbox = Outbox(tmp_path, RUN)
    outbox.append(points(0))
    with (tmp_path / OUTBOX).open("ab") as file:
        file.write(torn)
    again = Outbox(tmp_path, RUN)
    assert held(again) == points(0)
    again.append(points(1))
    assert held(again) == points(0, 1)
    assert (tmp_path / OUTBOX).read_text() == "".join(map(to_line, points(0, 1)))


def test_a_cut_inside_a_line_or_behind_the_end(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path, RUN)
    outbox.append(points(0, 1))
    whole = outbox.length
    assert outbox.cut(whole + 100) == whole
    assert outbox.cut(whole - 1) == len(to_line(points(0)[0]))


@pytest.mark.parametrize(
    "noted",
    ["", "{}", "[1]", "null", "x", "[" * 9000]
    + [json.dumps({"run_id": RUN, "bytes": bad}) for bad in ("7", -3, True, 0.5, None)],
)
def test_a_damaged_note_delivers_again(noted: str, tmp_path: Path) -> None:
    Outbox(tmp_path, RUN).append(points(0))
    (tmp_path / SENT).write_text(noted)
    assert held(Outbox(tmp_path, RUN)) == points(0)


def test_a_note_of_too_much_is_not_more_than_all(tmp_path: Path) -> None:
    Outbox(tmp_path, RUN).append(points(0))
    (tmp_path / SENT).write_text(json.dumps({"run_id": RUN, "bytes": 10**9}))
    outbox = Outbox(tmp_path, RUN)
    outbox.append(points(1))
    assert held(outbox) == points(1)


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    outbox = Outbox(tmp_path, RUN)
    outbox.append(points(0))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="space"):
            outbox.append(points(1), durable=True)
    outbox.append(points(1, 2), durable=True)
    assert held(outbox) == points(0, 1, 2) == held(Outbox(tmp_path, RUN))


def test_undelivered(tmp_path: Path) -> None:
    assert not undelivered(tmp_path)  # not tracked
    outbox = Outbox(tmp_path, RUN)
    outbox.append(points(0))
    assert undelivered(tmp_path)  # its MLflow run is not known
    (tmp_path / RUN_ID_FILE).write_text(f"{RUN}\n")
    assert undelivered(tmp_path)
    outbox.note_sent(outbox.length)
    assert not undelivered(tmp_path)
