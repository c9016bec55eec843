"""Checkpoints: whole or not at all, verified, plain, the newest good one found."""

import hashlib
import io
import logging
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from cl_moe import checkpoint
from cl_moe.checkpoint import Branch, Checkpoints, Moment
from cl_moe.errors import InputError


def state(number: int) -> dict[str, object]:
    return {"weights": {"w": torch.full((3,), float(number))}, "ledger": [{"act": "grow", "n": number}]}


def save(
    folder: Path, *moments: int | tuple[int, int], keep: int | None = None, best: int = -1
) -> list[Path]:
    keeper = Checkpoints(keep=keep)
    places = [Moment(*m) if isinstance(m, tuple) else Moment(m) for m in moments]
    return [keeper.save(folder, place, state(place.boundary), best) for place in places]


def plant(folder: Path, number: int, content: bytes) -> Path:
    """A file whose name promises just this content."""
    path = folder / f"boundary_{number:03d}-{hashlib.sha256(content).hexdigest()[:16]}.pt"
    path.write_bytes(content)
    return path


def archive(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    save(tmp_path / "new" / "folder", 0, 1, 2)
    found = checkpoint.newest(tmp_path / "new" / "folder")
    assert found is not None
    assert found["boundary"] == 2
    assert torch.equal(found["weights"]["w"], torch.full((3,), 2.0))
    assert found["ledger"] == [{"act": "grow", "n": 2}]


def test_no_checkpoint_is_no_error(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path) is None
    assert checkpoint.newest(tmp_path / "nowhere") is None
    (tmp_path / "boundary_003.pt").write_bytes(b"not a name of ours")
    (tmp_path / "notes.txt").write_text("neither")
    assert checkpoint.newest(tmp_path) is None


def test_boundaries_are_ordered_by_number(tmp_path: Path) -> None:
    save(tmp_path, 2, 999, 1000)
    assert checkpoint.newest(tmp_path)["boundary"] == 1000


def test_the_newest_are_kept(tmp_path: Path) -> None:
    paths = save(tmp_path, 0, 1, 2, 3, keep=2)
    assert sorted(tmp_path.iterdir()) == sorted(paths[-2:])


def test_the_best_is_kept_beside_the_newest(tmp_path: Path) -> None:
    paths = save(tmp_path, 0, 1, 2, 3, 4, keep=2, best=1)
    assert sorted(tmp_path.iterdir()) == sorted([paths[1], *paths[-2:]])


def test_all_boundaries_are_kept_by_default(tmp_path: Path) -> None:
    paths = save(tmp_path, *range(12))
    assert sorted(tmp_path.iterdir()) == sorted(paths)


def test_two_moments_inside_are_kept_until_the_next_boundary(tmp_path: Path) -> None:
    paths = save(tmp_path, 0, 1, (1, 3), (1, 6), (1, 100000000))
    assert sorted(tmp_path.iterdir()) == sorted([*paths[:2], *paths[-2:]])
    found = checkpoint.newest(tmp_path)
    assert (found["boundary"], found["batches"]) == (1, 100000000)
    (boundary,) = save(tmp_path, 2)
    assert sorted(tmp_path.iterdir()) == sorted([*paths[:2], boundary])


def test_a_branch_finds_its_boundary_or_says_which_there_are(tmp_path: Path) -> None:
    paths = save(tmp_path / "checkpoints", 0, 1, 2, (2, 7))
    found = checkpoint.at(Branch(tmp_path, 1), lambda state: None)
    assert (found["boundary"], found["batches"]) == (1, 0)
    with pytest.raises(InputError, match=r"\(0, 1, 2\)"):
        checkpoint.at(Branch(tmp_path, 3), lambda state: None)
    with pytest.raises(InputError, match="not good"):
        checkpoint.at(Branch(tmp_path, 1), lambda state: "is of another model")
    flip(paths[1])
    with pytest.raises(InputError, match="not good"):
        checkpoint.at(Branch(tmp_path, 1), lambda state: None)


def test_what_is_not_this_runs_is_passed_over(tmp_path: Path, caplog) -> None:
    save(tmp_path, 1, 2)
    refuse = {2: "is of another model"}
    with caplog.at_level(logging.WARNING):
        found = checkpoint.newest(tmp_path, lambda state: refuse.get(state["boundary"]))
    assert found["boundary"] == 1
    assert "is of another model: going back to the one before" in caplog.text


def test_nothing_temporary_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (first,) = save(tmp_path, 0)
    assert list(tmp_path.iterdir()) == [first]

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        save(tmp_path, 1)
    assert list(tmp_path.iterdir()) == [first], "neither a temporary file nor half a checkpoint"


def test_a_half_written_file_of_a_killed_process_is_swept_away(tmp_path: Path) -> None:
    left = tmp_path / ".boundary_001.4711"
    left.write_bytes(b"half")
    (path,) = save(tmp_path, 1)
    assert list(tmp_path.iterdir()) == [path]


def test_the_name_appears_only_with_the_whole_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    replace = os.replace

    def watched(source: Path, target: Path) -> None:
        seen.append((Path(target).exists(), hashlib.sha256(Path(source).read_bytes()).hexdigest()[:16]))
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    (path,) = save(tmp_path, 0)
    assert seen == [(False, path.stem.split("-")[1])]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def foreign(path: Path) -> None:
    path.unlink()
    plant(path.parent, 2, b"GIF89a, of all things")


def other_object(path: Path) -> None:
    path.unlink()
    plant(path.parent, 2, archive([1, 2, 3]))


def newer_version(path: Path) -> None:
    path.unlink()
    plant(path.parent, 2, archive({"format": checkpoint.FORMAT + 1, "boundary": 2}))


def good_archive_cut_before_naming(path: Path) -> None:
    content = path.read_bytes()
    path.unlink()
    plant(path.parent, 2, content[: len(content) // 2])


DAMAGES = [cut, flip, empty, foreign, other_object, newer_version, good_archive_cut_before_naming]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_bad_file_falls_back_to_the_one_before(tmp_path: Path, caplog, damage) -> None:
    paths = save(tmp_path, 1, 2)
    damage(paths[1])
    with caplog.at_level(logging.WARNING):
        found = checkpoint.newest(tmp_path)
    assert found["boundary"] == 1
    assert torch.equal(found["weights"]["w"], torch.ones(3))
    assert len(caplog.records) == 1
    assert "boundary_002" in caplog.text
    assert "the one before" in caplog.text


@pytest.mark.parametrize("damage", DAMAGES)
def test_none_good_is_an_error_that_says_so(tmp_path: Path, damage) -> None:
    damage(save(tmp_path, 2)[0])
    with pytest.raises(InputError) as caught:
        checkpoint.newest(tmp_path)
    assert caught.value.key == "resume"
    assert str(tmp_path) in caught.value.got


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("stray", ["0000000000000000", "ffffffffffffffff"])
def test_after_a_fall_back_the_new_file_outlives_the_bad_ones(tmp_path: Path, keep: int, stray: str) -> None:
    """Bad files of later boundaries, or of the same one, must not push out what was just written."""
    save(tmp_path, 1)
    for number in (2, 3):
        (tmp_path / f"boundary_{number:03d}-{stray}.pt").write_bytes(b"damaged")
    assert checkpoint.newest(tmp_path)["boundary"] == 1
    path = Checkpoints(keep=keep).save(tmp_path, Moment(2), state(20), best=0)
    assert path.exists()
    found = checkpoint.newest(tmp_path)
    assert (found["boundary"], found["weights"]["w"][0].item()) == (2, 20.0)


class Bomb:
    """A pickle that runs a command when it is read the careless way."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize(
    "wrap", [lambda bomb: bomb, lambda bomb: {"format": checkpoint.FORMAT, "boundary": 2, "x": bomb}]
)
@pytest.mark.parametrize("write", [pickle.dumps, archive])
def test_a_pickle_that_would_run_code_is_refused_unread(tmp_path: Path, caplog, write, wrap) -> None:
    mark = tmp_path / "executed"
    content = write(wrap(Bomb(mark)))
    pickle.loads(pickle.dumps(Bomb(mark)))
    assert mark.exists(), "the bomb is live"
    mark.unlink()
    folder = tmp_path / "checkpoints"
    save(folder, 1)
    plant(folder, 2, content)
    with caplog.at_level(logging.WARNING):
        assert checkpoint.newest(folder)["boundary"] == 1
    assert not mark.exists()
    assert "cannot be read" in caplog.text


def test_a_file_is_not_believed_by_its_name(tmp_path: Path, caplog) -> None:
    (path,) = save(tmp_path, 1)
    shutil.copy(path, path.with_name(path.name.replace("boundary_001", "boundary_007")))
    with caplog.at_level(logging.WARNING):
        assert checkpoint.newest(tmp_path)["boundary"] == 1
    assert "has another name" in caplog.text
    assert checkpoint.boundaries(tmp_path.parent) == []


@pytest.mark.parametrize("error", [MemoryError(), OSError(5, "Input/output error")])
def test_what_the_machine_could_not_read_is_not_called_bad(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    save(tmp_path, 1, 2)

    def failing(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(torch, "load", failing)
    with pytest.raises(type(error)):
        checkpoint.newest(tmp_path)


def test_what_was_passed_over_is_put_aside_not_deleted(tmp_path: Path) -> None:
    _, second = save(tmp_path, 1, 2)
    content = archive({"format": checkpoint.FORMAT + 1})
    newer = plant(tmp_path, 3, content)
    assert checkpoint.newest(tmp_path)["boundary"] == 2
    Checkpoints().save(tmp_path, Moment(2, 5), state(2), best=0)
    assert second.exists()
    assert not newer.exists()
    assert newer.with_name(f"{newer.name}.passed_over").read_bytes() == content


def test_a_folder_can_be_moved(tmp_path: Path) -> None:
    save(tmp_path / "here", 1)
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert checkpoint.newest(tmp_path / "there")["boundary"] == 1
