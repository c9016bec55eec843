"""The files in which a run's folder remembers its command, read as what may be damaged or a stranger's.

Nothing heavy is imported here.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from cl_moe.errors import InputError
from cl_moe.tracking.store import absolute_uri, database

COMMAND = "command.yaml"
"""The arguments that a run was started with, and where."""
CONFIG = "config.yaml"
"""The resolved configuration."""


class Command(NamedTuple):
    """What a run was started with.

    Args:
        overrides: the arguments, without Hydra's own.
        config_dir: the folder given as ``--config-dir``.
        folder: of the run, as it was then.
        store: the MLflow store's absolute URI, if ``tracking.uri`` is relative to the working folder.
    """

    overrides: list[str]
    config_dir: str | None = None
    folder: str | None = None
    store: str | None = None


def read_command(folder: Path, key: str) -> Command:
    """The command of the run in a folder.

    Raises:
        InputError: the file is not what a run writes; ``key`` names the argument that chose the folder.
    """
    found = mapping(folder / COMMAND) or {}
    overrides = found.get("overrides")
    others = {name: found.get(name) for name in Command._fields[1:]}
    if not isinstance(overrides, list) or not all(isinstance(word, str) for word in overrides):
        raise _refusal(folder / COMMAND, "the arguments of a run", key)
    if not all(value is None or isinstance(value, str) for value in others.values()):
        raise _refusal(folder / COMMAND, "the arguments of a run", key)
    return Command(overrides, **others)


def read_config(folder: Path, key: str) -> dict[Any, Any]:
    """The configuration of the run in a folder.

    Raises:
        InputError: the file is not what a run writes; ``key`` names the argument that chose the folder.
    """
    found = mapping(folder / CONFIG)
    if found is None:
        raise _refusal(folder / CONFIG, "the configuration of a run", key)
    return found


def mapping(path: Path) -> dict[Any, Any] | None:
    """What a YAML file holds, as it is written; None if that is no mapping, or empty, or not to be read."""
    try:
        content = OmegaConf.to_container(OmegaConf.load(path))
    except Exception:  # YAML's and OmegaConf's errors have no other base
        return None
    return content if isinstance(content, dict) and content else None


def store_of(folder: Path, key: str) -> str | None:
    """The MLflow store of the run in a folder, if its arguments name it relative to a working folder.

    It may have moved, or have been copied, together with the run's folder. None if it is in neither place.

    Raises:
        InputError: the command is not what a run writes; ``key`` names the argument that chose the folder.
    """
    command = read_command(folder, key)
    file = database(command.store or "")
    if file is None or command.folder is None:
        return None
    beside = Path(os.path.normpath(folder / os.path.relpath(file, command.folder)))
    places = [place for place in (beside, file) if place.is_file()]
    return str(command.store).replace(str(file), str(places[0])) if places else None


def fixed(uri: str | None) -> str | None:
    """A tracking URI that means the same in every working folder; others than sqlite's stay as they are."""
    if uri is None or database(uri) is None:
        return uri
    file = str(database(absolute := absolute_uri(uri)))
    return absolute.replace(file, os.path.normpath(file))


def _refusal(file: Path, what: str, key: str) -> InputError:
    return InputError(
        got=f"{file}, which does not hold {what}",
        allowed="the file as the run wrote it, or another folder",
        key=key,
    )
