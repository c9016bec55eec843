"""What a launch leaves in a run's folder, and finds of an earlier one: its command, and how it ended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from cl_moe import files
from cl_moe.arguments import BESIDE_RESUME
from cl_moe.ending import one_writer
from cl_moe.errors import InputError
from cl_moe.folder import COMMAND, CONFIG, Command, fixed, mapping, read_config
from cl_moe.schema import leaves, plain
from cl_moe.tracking import provenance
from cl_moe.tracking.outbox import undelivered
from cl_moe.words import is_under

FINISHED = "finished.yaml"
"""Written last of all: the objective of a run that has nothing left to do."""


def compare_config(config: DictConfig, folder: Path) -> None:
    """Let a run into a folder only if it is empty of runs, or holds one of the same configuration.

    Raises:
        InputError: the first key that differs, or what is stored is no configuration.
    """
    if not (folder / CONFIG).exists():
        return
    old, new = dict(leaves(read_config(folder, "output_dir (or resume)"))), dict(leaves(plain(config)))
    for key in sorted(old.keys() | new.keys()):
        if not is_under(key, ("output_dir", *BESIDE_RESUME)) and old.get(key) != new.get(key):
            raise InputError(
                got=f"{key}={new.get(key)!r} in a run that began with {old.get(key)!r}",
                allowed="the configuration of the run that is resumed, or a new folder",
                key=key,
            )


def store_config(config: DictConfig, folder: Path) -> None:
    """Write the resolved configuration and the arguments into the run's folder, if they are not there.

    Raises:
        InputError: another process writes to the folder, or another command came first.
    """
    with one_writer(folder):
        if (folder / CONFIG).exists():
            return compare_config(config, folder)
        sources = HydraConfig.get().runtime.config_sources
        uri = config.tracking.get("uri")
        command = Command(
            overrides=list(HydraConfig.get().overrides.task),
            config_dir=next((source.path for source in sources if source.provider == "command-line"), None),
            folder=str(folder),
            store=None if fixed(uri) == uri else fixed(uri),
        )
        # Not Hydra's own record, which stands elsewhere if output_dir was given, and may be half written.
        _write(folder / COMMAND, command._asdict())
        if changes := provenance.diff():
            files.write_atomically(folder / provenance.DIFF, changes)
        _write(folder / CONFIG, plain(config) | {"resume": None, "output_dir": str(folder)})


def folder_of(config: DictConfig) -> Path:
    """The folder of a configured run."""
    return Path(config.output_dir).absolute()


def finished(config: DictConfig) -> float | None:
    """The objective of a run that ended here and is not to be looked at again; None to run it.

    Jobs of a sweep are, and runs with ``auto_resume``. An explicit ``resume`` goes all the way once more, and
    so does a run of which the tracker has not got everything.

    Raises:
        InputError: a run of another configuration ended here.
    """
    again = config.auto_resume is True or HydraConfig.get().mode == RunMode.MULTIRUN
    if config.resume is not None or not again or not isinstance(config.output_dir, str):
        return None
    folder = folder_of(config)
    noted = mapping(folder / FINISHED) or {}
    if not noted or noted.get("open") is True or undelivered(folder):
        return None  # more may have arrived
    compare_config(config, folder)
    if not isinstance(noted.get("value"), float) or noted.get("objective") != config.objective:
        return None
    hydra = HydraConfig.get()
    name = "the run"
    if hydra.mode == RunMode.MULTIRUN:
        name = f"job {hydra.job.num} ({hydra.job.override_dirname})"
    print(f"{name} is finished: {noted['objective']} = {noted['value']:.6g}, in {folder}")
    return float(noted["value"])


def note_finished(config: DictConfig, folder: Path, value: float, may_go_on: bool) -> None:
    """Note that a run has returned its objective, and whether its stream is an open one."""
    note = {"objective": config.objective, "value": float(value)}
    _write(folder / FINISHED, note | ({"open": True} if may_go_on else {}))


def check_command_line(config: DictConfig) -> None:
    """Refuse ``resume`` and ``auto_resume`` from a file: the folder was chosen before any file was read.

    Raises:
        InputError: it did not come from the command line.
    """
    given = {str(word).lstrip("+").partition("=")[0] for word in HydraConfig.get().overrides.task}
    for key, none in (("auto_resume", False), ("resume", None)):
        if config[key] != none and key not in given:
            value = str(config[key]).lower() if key == "auto_resume" else config[key]
            raise InputError(
                got=f"{key}={value} in a file", allowed=f"{key}={value} on the command line", key=key
            )


def _write(path: Path, content: dict[Any, Any]) -> None:
    files.write_atomically(path, OmegaConf.to_yaml(OmegaConf.create(content)).encode())
