"""What all tests share: one thread, hypothesis without a clock, and the command line run in this process."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from omegaconf import DictConfig, open_dict

collect_ignore = ["killed.py", "company.py", "chaos.py", "browser.py", "pictures.py"]  # programs, not tests
torch.set_num_threads(1)
settings.register_profile("cl_moe", deadline=None, derandomize=True)
settings.load_profile("cl_moe")


@dataclass
class Outcome:
    """What a command did: its exit status, what it printed, and what it returned to Hydra."""

    status: int
    text: str
    objectives: list[float] = field(default_factory=list)


Command = Callable[..., Outcome]


@pytest.fixture(scope="session")
def ready_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow store: its migrations take seconds, so they are made once and copied."""
    from cl_moe.tracking import store

    file = tmp_path_factory.mktemp("ready") / "mlflow.db"
    store.open_store(f"sqlite:///{file}")
    return file


@pytest.fixture
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of a test draw no figures, which takes longer than they do: ``usefixtures("no_drawing")``."""
    from cl_moe.tracking import figures

    monkeypatch.setattr(figures, "write_figures", lambda record, folder: [])


@pytest.fixture(scope="session")
def composed() -> Callable[..., DictConfig]:
    """``composed("layer=moe", ...)`` is the configuration that a run with these arguments gets."""
    from hydra import compose, initialize_config_module
    from hydra.core.hydra_config import HydraConfig

    def compose_here(*overrides: str) -> DictConfig:
        with initialize_config_module("conf", version_base="1.3"):
            config = compose("config", ["output_dir=unused", *overrides], return_hydra_config=True)
        HydraConfig.instance().set_config(config)
        with open_dict(config):
            del config["hydra"]
        return config

    return compose_here


@pytest.fixture(scope="session")
def command_in(ready_store: Path) -> Callable[..., Outcome]:
    """``command_in(folder, "layer=moe", ...)`` runs cl-moe in a folder, which gets a store if it has none."""

    def run(folder: Path, *arguments: str) -> Outcome:
        if not (folder / "mlflow.db").exists():
            shutil.copy(ready_store, folder / "mlflow.db")
        with contextlib.chdir(folder), _process_state():
            return _run_here(*arguments)

    return run


@pytest.fixture
def command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command_in: Callable[..., Outcome], ready_store: Path
) -> Command:
    """``command("layer=moe", ...)`` runs cl-moe in an empty folder that has an MLflow store."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(ready_store, tmp_path / "mlflow.db")
    return functools.partial(command_in, tmp_path)


@contextlib.contextmanager
def _process_state() -> Iterator[None]:
    """Puts back what a command leaves in the process: Hydra's singletons, logging's handlers, a signal."""
    from hydra.core.singleton import Singleton

    from cl_moe import cli  # noqa: F401 - its import tells Hydra the version to be like

    singletons, handler = Singleton.get_state(), signal.getsignal(signal.SIGINT)
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        yield
    finally:
        Singleton.set_state(singletons)
        root.handlers[:] = handlers
        root.setLevel(level)
        signal.signal(signal.SIGINT, handler)


def _run_here(*arguments: str) -> Outcome:
    from hydra.core.global_hydra import GlobalHydra

    from cl_moe import cli, launch

    run, objectives, text = launch.run, [], io.StringIO()

    def noting(config: object) -> float:
        objectives.append(run(config))  # type: ignore[arg-type]
        return objectives[-1]

    GlobalHydra.instance().clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "run", noting)
        patch.setattr(sys, "argv", ["cl-moe"])
        quiet = contextlib.redirect_stderr(text), contextlib.redirect_stdout(text)
        with quiet[0], quiet[1], pytest.raises(SystemExit) as ended:
            cli.main(arguments)
    return Outcome(int(ended.value.code or 0), text.getvalue(), objectives)
