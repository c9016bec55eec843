"""What a run's folder remembers: found again from elsewhere, refused when it is damaged, written by one."""

from __future__ import annotations

import contextlib
import shlex
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from filelock import FileLock
from mlflow import MlflowClient
from mlflow.entities import Run

from cl_moe import stored
from cl_moe.folder import fixed
from cl_moe.learner import Learner
from cl_moe.tracking import artifacts, figures

SMALL = ("trainer.epochs=1", "stream.tune_on_first=2", "model.width=16")
PLAIN = (*SMALL, "tracking=none", "hydra.run.dir=out")


pytestmark = pytest.mark.usefixtures("no_drawing")


def runs(folder: Path) -> list[Run]:
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    found = client.search_runs([e.experiment_id for e in client.search_experiments()])
    return [run for run in found if "sweep_parent" not in run.data.tags]


def unfinished(folder: Path) -> None:
    """As if the run had been killed before its last boundary."""
    for file in (folder / "checkpoints").glob("boundary_002-*"):
        file.unlink()


def test_a_run_goes_on_in_its_store_from_another_working_folder(command_in: Callable, tmp_path: Path):
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    home.mkdir()
    elsewhere.mkdir()
    assert command_in(home, *SMALL, "hydra.run.dir=out").status == 0
    unfinished(home / "out")
    done = command_in(elsewhere, f"resume={home / 'out'}")
    assert done.status == 0, done.text
    assert "resumed after experience 1 of 2" in done.text
    assert len(runs(home)) == 1
    assert not runs(elsewhere)

    (elsewhere / "stores").mkdir()
    (home / "mlflow.db").rename(elsewhere / "stores/moved.db")
    lost = command_in(elsewhere, f"resume={home / 'out'}")
    assert (lost.status, lost.text.count("change: ")) == (2, 1)
    assert "tracking.uri" in lost.text
    found = command_in(elsewhere, f"resume={home / 'out'}", "tracking.uri=sqlite:///stores/moved.db")
    assert found.status == 0, found.text


@pytest.mark.slow
def test_a_child_elsewhere_has_the_store_of_its_own_working_folder(command_in: Callable, tmp_path: Path):
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    home.mkdir()
    elsewhere.mkdir()
    assert command_in(home, *SMALL, "hydra.run.dir=out").status == 0
    for where, linked in ((elsewhere, False), (home, True)):
        done = command_in(where, f"branch={home / 'out'}@1", "hydra.run.dir=child")
        assert done.status == 0, done.text
        (child,) = [run for run in runs(where) if "branch" in run.data.tags]
        assert ("mlflow.parentRunId" in child.data.tags) == linked


@pytest.mark.slow
def test_a_sweep_goes_on_in_its_store_from_another_working_folder(command_in: Callable, tmp_path: Path):
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    home.mkdir()
    elsewhere.mkdir()
    assert command_in(home, "-m", *SMALL, "seed.init=0,1", "hydra.sweep.dir=sweep").status == 0
    shutil.rmtree(home / "sweep/1")
    done = command_in(elsewhere, f"resume={home / 'sweep'}")
    assert (done.status, done.text.count(" is finished: ")) == (0, 1), done.text
    assert len(runs(home)) == 3
    assert not runs(elsewhere)


def test_a_known_run_whose_folder_moved(command_in: Callable, tmp_path: Path):
    assert command_in(tmp_path, *SMALL, "hydra.run.dir=out").status == 0
    (run,) = runs(tmp_path)
    (tmp_path / "out").rename(tmp_path / "moved")
    for key, rest in (("resume", ""), ("branch", "@1")):
        done = command_in(tmp_path, f"{key}={run.info.run_id}{rest}")
        assert done.status == 2
        assert f"not in its folder {tmp_path / 'out'}" in done.text
        assert f"allowed: {key}=<the folder where that run is now>{rest}\n" in done.text
    done = command_in(tmp_path, "resume=moved")
    assert done.status == 0, done.text
    assert len(runs(tmp_path)) == 1


@pytest.fixture(scope="module")
def ended(command_in: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a run ended, in ``out``."""
    folder = tmp_path_factory.mktemp("ended")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "write_figures", lambda record, folder: [])
        assert command_in(folder, *PLAIN).status == 0
    return folder


@pytest.mark.parametrize("content", ["", "[1]", "a: [", "\0", "3"])
@pytest.mark.parametrize(
    "words", [("resume=out",), ("branch=out@1",), PLAIN], ids=["resume", "branch", "same"]
)
def test_a_damaged_configuration_is_named(
    words: tuple[str, ...], content: str, ended: Path, command_in: Callable, tmp_path: Path
):
    shutil.copytree(ended, tmp_path, dirs_exist_ok=True)
    (tmp_path / "out/config.yaml").write_text(content)
    done = command_in(tmp_path, *words)
    assert (done.status, done.text.count("got: ")) == (2, 1), done.text
    assert f"{tmp_path}/out/config.yaml, which does not hold" in done.text


def test_a_configuration_is_read_as_it_is_written(ended: Path, command_in: Callable, tmp_path: Path):
    """An interpolation in a stranger's file asks nothing of this machine."""
    shutil.copytree(ended, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "out/config.yaml"
    stored = yaml.safe_load(file.read_text())
    stored["optimizer"]["lr"] = "${oc.env:HOME}"
    file.write_text(yaml.safe_dump(stored))
    done = command_in(tmp_path, "resume=out")
    assert done.status == 2
    assert "in a run that began with '${oc.env:HOME}'" in done.text


def test_a_refused_command_changes_nothing_in_a_folder(ended: Path, command_in: Callable, tmp_path: Path):
    shutil.copytree(ended, tmp_path, dirs_exist_ok=True)

    def contents() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}

    before = contents()
    assert command_in(tmp_path, *PLAIN, "optimizer.lr=3").status == 2
    assert contents() == before
    assert not (tmp_path / "out/.hydra").exists()


def test_a_second_command_waits_for_nobody(command_in: Callable, tmp_path: Path):
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out/.lock"):
        done = command_in(tmp_path, *PLAIN)
    assert done.status == 2
    assert "another process is writing" in done.text
    assert not list((tmp_path / "out").glob("*.yaml"))


def test_of_two_commands_that_start_together_one_has_the_folder(
    ended: Path, command_in: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    one_writer = stored.one_writer

    @contextlib.contextmanager
    def late(folder: Path) -> Iterator[None]:
        with one_writer(folder):
            for name in ("command.yaml", "config.yaml"):  # the other was quicker
                shutil.copy(ended / "out" / name, folder / name)
            yield

    monkeypatch.setattr(stored, "one_writer", late)
    done = command_in(tmp_path, *PLAIN, "optimizer.lr=3")
    assert done.status == 2
    assert "optimizer.lr=3 in a run that began with" in done.text
    for name in ("command.yaml", "config.yaml"):
        assert (tmp_path / "out" / name).read_bytes() == (ended / "out" / name).read_bytes()


def test_resume_comes_from_the_command_line(command_in: Callable, tmp_path: Path):
    (tmp_path / "mine/experiment").mkdir(parents=True)
    (tmp_path / "mine/experiment/again.yaml").write_text("# @package _global_\nresume: out\n")
    done = command_in(tmp_path, "--config-dir", "mine", "experiment=again", *PLAIN)
    assert (done.status, done.text.count("change: resume")) == (2, 1), done.text


@pytest.mark.parametrize("where", ["in training", pytest.param("at the end", marks=pytest.mark.slow)])
def test_a_sweep_that_was_stopped_goes_on_as_a_sweep(
    where: str, command_in: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked = []
    owner, name = {
        "in training": (Learner, "training_step"),
        "at the end": (artifacts, "write_artifacts"),
    }[where]
    original = getattr(owner, name)

    def asking(*words: object) -> object:
        if not asked:
            asked.append(signal.raise_signal(signal.SIGTERM))
        return original(*words)

    monkeypatch.setattr(owner, name, asking)
    words = ("-m", *SMALL, "tracking=none", "seed.init=0,1", "hydra.sweep.dir=the sweep")
    stopped = command_in(tmp_path, *words)
    assert stopped.status == 75, stopped.text
    last = stopped.text.splitlines()[-1]
    assert last == f"go on: cl-moe resume={shlex.quote(str(tmp_path / 'the sweep'))}"
    assert not (tmp_path / "the sweep/1/checkpoints").exists()
    done = command_in(tmp_path, f"resume={tmp_path / 'the sweep'}")
    assert (done.status, len(done.objectives)) == (0, 2), done.text


def test_a_store_is_named_the_same_from_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert fixed("sqlite:///../x.db?timeout=3") == f"sqlite:///{tmp_path.parent}/x.db?timeout=3"
    for uri in (f"sqlite:///{tmp_path}/x.db", "http://x", None):
        assert fixed(uri) == uri
