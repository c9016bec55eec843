"""What a run's folder remembers of its command: configuration, arguments, and how the run ended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from cl_moe.arguments import BESIDE_RESUME
from cl_moe.checkpoint import write_atomically
from cl_moe.errors import InputError
from cl_moe.schema import COMMAND, CONFIG, leaves, plain
from cl_moe.tracking.outbox import undelivered

FINISHED = "finished.yaml"
"""Written last of all: the objective of a run that has nothing left to do."""


def compare_config(config: DictConfig, folder: Path) -> None:
    """Let a run into a folder only if it is empty of runs, or holds one of the same configuration.

    Raises:
        InputError: the first key that differs.
    """
    path = folder / CONFIG
    if not path.exists():
        return
    old, new = dict(leaves(plain(OmegaConf.load(path)))), dict(leaves(_resolved(config, folder)))
    for key in sorted(old.keys() | new.keys()):
        if key.split(".")[0] not in ("output_dir", *BESIDE_RESUME) and old.get(key) != new.get(key):
            raise InputError(
                got=f"{key}={new.get(key)!r} in a run that began with {old.get(key)!r}",
                allowed="the configuration of the run that is resumed, or a new folder",
                key=key,
            )


def store_config(config: DictConfig, folder: Path) -> None:
    """Write the resolved configuration and the arguments into the run's folder, if they are not there."""
    compare_config(config, folder)
    if (folder / CONFIG).exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    sources = HydraConfig.get().runtime.config_sources
    command = {
        "overrides": list(HydraConfig.get().overrides.task),
        "config_dir": next((source.path for source in sources if source.provider == "command-line"), None),
    }
    # Not Hydra's own record, which stands elsewhere if output_dir was given, and may be half written.
    _write(folder / COMMAND, command)
    _write(folder / CONFIG, _resolved(config, folder))


def finished(config: DictConfig, folder: Path) -> float | None:
    """The objective of a run that ended here and is not to be looked at again; None to run it.

    Jobs of a sweep are, and runs with ``auto_resume``. An explicit ``resume`` goes all the way once more, and
    so does a run of which the tracker has not got everything.
    """
    again = config.auto_resume or HydraConfig.get().mode == RunMode.MULTIRUN
    if config.resume is not None or not again or not (folder / FINISHED).is_file() or undelivered(folder):
        return None
    noted = plain(OmegaConf.load(folder / FINISHED))
    if not isinstance(noted.get("value"), float) or noted.get("objective") != config.objective:
        return None
    hydra = HydraConfig.get()
    name = "the run"
    if hydra.mode == RunMode.MULTIRUN:
        name = f"job {hydra.job.num} ({hydra.job.override_dirname})"
    print(f"{name} is finished: {noted['objective']} = {noted['value']:.6g}, in {folder}")
    return float(noted["value"])


def note_finished(config: DictConfig, folder: Path, value: float) -> None:
    """Note that a run has returned its objective."""
    _write(folder / FINISHED, {"objective": config.objective, "value": float(value)})


def check_auto_resume(config: DictConfig) -> None:
    """Refuse ``auto_resume`` from a file: the folder was chosen before any file was read.

    Raises:
        InputError: it did not come from the command line.
    """
    given = (str(word).lstrip("+") for word in HydraConfig.get().overrides.task)
    if config.auto_resume and not any(word.startswith("auto_resume=") for word in given):
        raise InputError(
            got="auto_resume=true in a file",
            allowed="auto_resume=true on the command line",
            key="auto_resume",
        )


def _resolved(config: DictConfig, folder: Path) -> dict[Any, Any]:
    return plain(config) | {"resume": None, "output_dir": str(folder)}


def _write(path: Path, content: dict[Any, Any]) -> None:
    write_atomically(path, OmegaConf.to_yaml(OmegaConf.create(content)).encode())
