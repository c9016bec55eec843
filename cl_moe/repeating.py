"""``reproduce=`` on the command line: the stored command of a run, for a run in a new folder.

Nothing heavy is imported here.
"""

from __future__ import annotations

from pathlib import Path

from cl_moe.errors import InputError
from cl_moe.folder import COMMAND, Command, read_command, store_of
from cl_moe.tracking.outbox import RUN_ID_FILE
from cl_moe.tracking.store import DEFAULT_URI, find_run
from cl_moe.words import is_sweep, is_under, key_of, quoted, split_flags, uri_of, with_config_dir, without

_BESIDE = ("output_dir", "hydra", "checkpoint", "tracking", "mlflow_experiment")
"""Keys that say how and where a run is kept, not what it is."""


def reproduced(arguments: list[str], name: str) -> list[str]:
    """The arguments of the run to make again, as it was given them, but for where the new one is kept.

    Args:
        arguments: of this command.
        name: of the run: its folder, or its MLflow id.

    Raises:
        InputError: no such run, or an argument that cannot stand beside ``reproduce``.
    """
    flags, given = split_flags(arguments)
    given = without(given, "reproduce")
    for word in [*given, *(flag for flag in flags if is_sweep([flag]))]:
        if not is_under(key_of(word), _BESIDE) or is_sweep([word]):
            raise InputError(
                got=f"{word} beside reproduce",
                allowed="one run, as it was; beside it " + ", ".join(_BESIDE),
                key=key_of(word),
            )
    command, store, name = _command_of(name, uri_of(arguments))
    kept = ("resume", "auto_resume", "output_dir", "reproduce", *map(key_of, given))
    known = [word for word in command.overrides if not is_under(key_of(word), kept)]
    if store is not None and not any(is_under(key_of(word), ("tracking",)) for word in given):
        known = [*without(known, "tracking.uri"), f"tracking.uri={quoted(store)}"]
    return [*with_config_dir(flags, command.config_dir), *known, *given, f"reproduce={quoted(name)}"]


def _command_of(name: str, uri: list[str]) -> tuple[Command, str | None, str]:
    """Of a run, the command, its store if that was relative to another folder, and its folder or run id."""
    folder = Path(name)
    if not folder.is_dir():
        folder = Path(find_run(name, *uri, key="reproduce").get("output_dir", name))
        mine = folder / RUN_ID_FILE
        if not mine.is_file() or mine.read_text(errors="replace").strip() != name:
            from cl_moe.tracking.fetching import fetched

            with fetched(name, [COMMAND], (uri or [DEFAULT_URI])[0], "reproduce") as place:
                return read_command(place, "reproduce"), None, name
    if not (folder / COMMAND).is_file():
        raise InputError(
            got=f"reproduce={name}",
            allowed="a run that has ended: its folder, or its id in the MLflow store tracking.uri",
            key="reproduce",
        )
    return read_command(folder, "reproduce"), store_of(folder, "reproduce"), str(folder.resolve())
