"""Disks that fill, files that may not grow, folders that cannot be made: named, and nothing whole is lost."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from cl_moe import checkpoint, failures
from cl_moe.errors import RunFailedError
from cl_moe.tracking import artifacts, figures

SMALL = ("trainer.epochs=1", "stream.tune_on_first=2", "hydra.run.dir=out")
GROWING = (  # each checkpoint is larger than the one before, by more than an MLflow store
    *("layer=moe", "layer.num_experts=2", "layer.hidden=256", "growth=every_experience"),
    *("optimizer=adamw", "trainer.epochs=1", "stream.tune_on_first=4"),
)
linux = pytest.mark.skipif(sys.platform != "linux", reason="a test of Linux")


pytestmark = pytest.mark.usefixtures("no_drawing")


def run_of(folder: Path) -> object:
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    return run


@contextmanager
def limited(kind: int, size: int) -> Iterator[None]:
    """A limit of this process, as ``ulimit`` sets it."""
    soft, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(kind, (soft, hard))


def same_end(one: Path, two: Path) -> None:
    assert (one / artifacts.MATRIX).read_bytes() == (two / artifacts.MATRIX).read_bytes()
    states = [checkpoint.newest(folder / "checkpoints") for folder in (one, two)]
    mine, other = (state["learner"]["model"] for state in states if state is not None)
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[key], other[key]) for key in mine)


@pytest.fixture(scope="module")
def undisturbed(command_in: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "write_figures", lambda record, folder: [])
        assert command_in(folder, *GROWING, "hydra.run.dir=out").status == 0
    return folder / "out"


def sizes(folder: Path) -> list[int]:
    return [path.stat().st_size for path in sorted((folder / "checkpoints").glob("boundary_*.pt"))]


def check_kept(done: object, folder: Path, place: Path, words: str) -> None:
    assert done.status == 1, done.text
    assert words in done.text
    assert "while saving or loading a checkpoint" in done.text
    assert "free on its file system: " in done.text
    assert "change: output_dir (another disk), checkpoint.keep (fewer)" in done.text
    assert "kept: the state after experience 2 of 4" in done.text
    assert "Traceback" not in done.text
    assert "defect" not in done.text
    run = run_of(folder)
    assert (run.info.status, run.data.tags["status"]) == ("FAILED", "failed")
    assert words in run.data.tags["failure"]
    kept = checkpoint.newest(place / "checkpoints")
    assert kept is not None
    assert kept["boundary"] == 2
    assert not list((place / "checkpoints").glob(".*")), "no half of a file"


@pytest.mark.slow
def test_a_file_that_may_not_grow(command: Callable, tmp_path: Path, undisturbed: Path) -> None:
    sized = sizes(undisturbed)
    assert sized == sorted(sized), "each is larger than the one before"
    with limited(resource.RLIMIT_FSIZE, (sized[2] + sized[3]) // 2):
        done = command(*GROWING, "hydra.run.dir=out", "tracking.uri=sqlite:///mlflow.db")
    check_kept(done, tmp_path, tmp_path / "out", "a file may not grow so large here")
    done = command("resume=out")
    assert done.status == 0, done.text
    same_end(tmp_path / "out", undisturbed)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """``small_disk(bytes)`` is a file system of that size, in memory; asked again, it has the new size."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(size: int, options: str = "") -> Path:
        again = "remount," if os.path.ismount(place) else ""
        words = ["mount", "-t", "tmpfs", "-o", f"{again}size={size}{options}", "none", str(place)]
        try:
            done = subprocess.run(words, capture_output=True, text=True)
        except OSError as error:
            pytest.skip(f"no file system can be mounted here: {error}")
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
        return place

    yield mount
    if os.path.ismount(place):
        subprocess.run(["umount", str(place)], check=True)


@linux
def test_a_disk_that_fills(
    command: Callable, tmp_path: Path, undisturbed: Path, small_disk: Callable[[int], Path]
) -> None:
    sized = sizes(undisturbed)
    disk = small_disk(sum(sized[:3]) + sized[3] // 2)
    done = command(*GROWING, f"hydra.run.dir={disk}/out")
    check_kept(done, tmp_path, disk / "out", "the disk is full")
    small_disk(sum(sized) * 4)
    done = command(f"resume={disk}/out")
    assert done.status == 0, done.text
    same_end(disk / "out", undisturbed)


@linux
def test_a_disk_without_room_for_a_folder(command: Callable, small_disk: Callable) -> None:
    disk = small_disk(4096)
    (disk / "filler").write_bytes(b"x" * 2048)
    for words in ((f"output_dir={disk}/out", "hydra.run.dir=hydra"), (f"hydra.run.dir={disk}/out",)):
        done = command(*SMALL, "tracking=none", *words)
        assert done.status == 1, done.text
        assert "the disk is full" in done.text
        assert "Traceback" not in done.text


@linux
def test_a_folder_that_cannot_be_made(command: Callable) -> None:
    """Nobody, root included, makes a folder there."""
    for words in (("output_dir=/sys/cl_moe", "hydra.run.dir=hydra"), ("hydra.run.dir=/sys/cl_moe",)):
        done = command(*SMALL, "tracking=none", *words)
        assert done.status == 1, done.text
        assert "/sys/cl_moe" in done.text
        assert "change: output_dir" in done.text
        assert "defect" not in done.text
        assert "Traceback" not in done.text


@linux
def test_a_read_only_disk(command: Callable, small_disk: Callable) -> None:
    disk = small_disk(2**20, ",ro")
    done = command(*SMALL, "tracking=none", f"output_dir={disk}/out", "hydra.run.dir=hydra")
    assert done.status == 1, done.text
    assert f"the file system is read-only: {disk}/out, while making the run's folder" in done.text


def test_an_output_dir_that_is_a_file(command: Callable, tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    for place in ("taken", "taken/below", "x" * 300):
        done = command(*SMALL, "tracking=none", f"output_dir={place}", "hydra.run.dir=hydra")
        assert done.status == 2, done.text
        assert "change: output_dir" in done.text


@pytest.mark.parametrize("number", sorted(failures._DISK))
def test_every_disk_error_names_the_file_and_the_part(number: int, tmp_path: Path) -> None:
    file = tmp_path / "results.csv"
    failure = failures.named(OSError(number, os.strerror(number), str(file)))
    assert isinstance(failure, RunFailedError)
    assert f"{failures._DISK[number]}: {file}, while running ({os.strerror(number)})" in str(failure)
    assert "free on its file system: " in str(failure)
    assert "change: " in str(failure)
    arrow = OSError(f"[Errno {number}] Error writing bytes to file")  # its number stands in the text only
    assert failures._DISK[number] in str(failures.named(arrow, folder=tmp_path))
    assert str(tmp_path) in str(failures.named(arrow, folder=tmp_path))
