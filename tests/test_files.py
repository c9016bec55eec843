"""Files that are whole or as they were, and never somebody else's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cl_moe.errors import InputError
from cl_moe.files import regular, whole_or_not, write_atomically


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_written_and_written_again(tmp_path: Path) -> None:
    for content in (b"one", memoryview(b"another")):
        write_atomically(tmp_path / "file", content)
        assert (tmp_path / "file").read_bytes() == content
    assert names(tmp_path) == ["file"]
    (tmp_path / "plain").write_bytes(b"")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("at", ["fsync", "replace"])
def test_a_disk_that_is_full_leaves_the_file_as_it_was(
    at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    write_atomically(tmp_path / "file", b"old")
    monkeypatch.setattr(os, at, full)
    with pytest.raises(OSError, match="No space") as caught:
        write_atomically(tmp_path / "file", b"new")
    assert Path(caught.value.filename).parent == tmp_path
    assert (tmp_path / "file").read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_a_block_that_gives_up_leaves_nothing(tmp_path: Path) -> None:
    def give_up() -> None:
        with whole_or_not(tmp_path / "part") as (file, _):
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        give_up()
    assert names(tmp_path) == []


def test_links_are_replaced_and_not_followed(tmp_path: Path) -> None:
    precious, folder = tmp_path / "precious", tmp_path / "folder"
    precious.write_bytes(b"mine")
    folder.mkdir()
    for name in ("file", f".file.{os.getpid()}"):
        (folder / name).symlink_to(precious)
    write_atomically(folder / "file", b"new")
    assert precious.read_bytes() == b"mine"
    assert (folder / "file").read_bytes() == b"new"
    assert not (folder / "file").is_symlink()
    assert names(folder) == ["file"]


@pytest.mark.parametrize("mode", ["rb", "r+b", "ab"])
@pytest.mark.parametrize("kind", ["link", "dangling", "pipe", "folder"])
def test_only_a_regular_file_is_opened(kind: str, mode: str, tmp_path: Path) -> None:
    path, other = tmp_path / "it", tmp_path / "other"
    if kind == "link":
        other.write_bytes(b"mine")
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(other)
    with pytest.raises(InputError) as caught, open(path, mode, opener=regular):
        pass
    assert caught.value.key == str(path)
    assert other.exists() == (kind == "link")


def test_a_regular_file_is_opened_as_usual(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), open(tmp_path / "it", "rb", opener=regular):
        pass
    with open(tmp_path / "it", "ab", opener=regular) as file:
        file.write(b"x")
    with open(tmp_path / "it", "rb", opener=regular) as file:
        assert file.read() == b"x"
