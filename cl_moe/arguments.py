"""What stands for other arguments on the command line: ``resume``, ``branch``, ``distill``, ``auto_resume``.

They are written out before Hydra composes anything, since they decide which arguments and which folder a
command has. Nothing heavy is imported here.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf

from cl_moe.errors import InputError
from cl_moe.schema import COMMAND

SWEEP = "multirun.yaml"
"""In a sweep's folder: Hydra's own record of its command."""
BESIDE_RESUME = ("resume", "auto_resume", "checkpoint")
"""Keys that say how a run survives, not what it is: they may change when it goes on."""
_NEVER_INHERITED = ("resume", "auto_resume", "output_dir", "hydra", "branch")
_STUDENT = {"layer": "dense", "growth": "never", "freeze": "never", "strategy": "distill_from"}
"""What a student has instead of its teacher's, unless it is given."""
_SAME_ARM = (*_NEVER_INHERITED, "checkpoint", "tracking", "seed", "mlflow_experiment")
_FLAGS_WITH_VALUE = ("--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn", "--package", "-p")


def rewritten(arguments: list[str]) -> list[str]:
    """The arguments that Hydra gets.

    Raises:
        InputError: no such run to resume or to branch from, or an argument that cannot stand beside that.
    """
    resumed, branch = _value(arguments, "resume"), _value(arguments, "branch")
    teacher = _value(arguments, "distill")
    if resumed is not None and branch is not None:
        raise InputError(
            got=f"branch={branch} beside resume={resumed}",
            allowed="branch to begin a child run; resume with the child's own folder to go on with it",
            key="branch (or resume)",
        )
    if branch is not None and teacher is not None:
        raise InputError(
            got=f"branch={branch} beside distill={teacher}",
            allowed="a student that begins anew, or a child that goes on",
            key="distill (or branch)",
        )
    if resumed is not None:
        return _resumed(arguments, resumed)
    if str(_value(arguments, "auto_resume")).lower() == "true":
        arguments = _with_lasting_folder(arguments)
    if teacher is not None:
        return _distilled(arguments, teacher)
    return arguments if branch is None else _branched(arguments, branch)


def branch_point(text: str, *uri: str, key: str = "branch") -> tuple[Path, int]:
    """Folder and boundary that ``<run id or run folder>@<experience>`` names.

    Args:
        text: the value of ``branch``, or of another key.
        uri: of the MLflow store in which a run id is looked up; without it the default one.
        key: that other key.

    Raises:
        InputError: it is not written like that, or there is no such run.
    """
    name, at, number = text.rpartition("@")
    if not name or not at or not re.fullmatch("[0-9]+", number):
        raise InputError(
            got=f"{key}={text}",
            allowed="<run id or run folder>@<whole number>: so many experiences of that run",
            key=key,
        )
    return _folder(name, f"{key}={text}", key, *uri), int(number)


def quoted(text: str) -> str:
    """A text as one value of an override."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _resumed(arguments: list[str], name: str) -> list[str]:
    """Those of the run, or the sweep, to go on with, in its own folder."""
    folder = _folder(name, f"resume={name}", "resume", *_uri(arguments))
    flags = _flags(arguments)
    if not (folder / COMMAND).is_file():
        return _resumed_sweep(arguments, flags, folder)
    if _is_sweep(arguments):
        raise InputError(
            got="resume of one run in a multirun",
            allowed="one run at a time, by its own folder or run id, or the folder of a whole sweep",
            key="resume",
        )
    command = _load(folder / COMMAND)
    known = _known_and_given(arguments, flags, map(str, command["overrides"]))
    known = _without(known, "output_dir")  # it may be relative to another folder
    own = (f"{key}={quoted(str(folder))}" for key in ("resume", "hydra.run.dir", "output_dir"))
    return [*_with_config_dir(flags, command["config_dir"]), *known, *own, "hydra.output_subdir=null"]


def _resumed_sweep(arguments: list[str], flags: list[str], folder: Path) -> list[str]:
    try:
        hydra = _load(folder / SWEEP)["hydra"]
        config_dirs = [
            s["path"] for s in hydra["runtime"]["config_sources"] if s["provider"] == "command-line"
        ]
        task, own = map(str, hydra["overrides"]["task"]), map(str, hydra["overrides"]["hydra"])
        begun_in = Path(hydra["runtime"]["cwd"])
    except Exception as error:  # errors of YAML have no other base
        raise InputError(
            got=f"{folder / SWEEP}, which does not hold the whole command",
            allowed=f"the sweep's own command with hydra.sweep.dir={folder}: finished jobs are skipped",
            key="resume",
        ) from error
    known = _known_and_given(arguments, [*flags, "hydra.mode=MULTIRUN"], [*task, *own])
    if any(_key(word) == "output_dir" for word in known) and begun_in != Path.cwd():
        raise InputError(
            got=f"a sweep with an output_dir of its own that began in {begun_in}, resumed in {Path.cwd()}",
            allowed=f"the working folder {begun_in}, so that its jobs find their folders",
            key="the working folder",
        )
    # As it was written, if that is this folder: the tag ``sweep`` of the jobs to come is this text.
    near = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
    written = _value(known, "hydra.sweep.dir") or str(near)
    place = written if Path(written).resolve() == folder else str(folder)
    known = _without(known, "hydra.sweep.dir", "hydra.mode")
    flags = _with_config_dir(flags, *config_dirs)
    many = [] if _is_sweep(flags) else ["--multirun"]
    return [*flags, *many, *known, f"hydra.sweep.dir={quoted(place)}"]


def _known_and_given(arguments: list[str], flags: list[str], stored: Iterable[str]) -> list[str]:
    """The stored arguments of a run, and of those beside ``resume`` what may change; the rest is refused."""
    known, given = _without(stored, "resume"), _without(arguments, "resume")
    for word in given:
        if word not in flags and word not in known and not _is_under(_key(word), BESIDE_RESUME):
            raise InputError(
                got=f"{word} beside resume",
                allowed="nothing else, or the run's own arguments: " + (" ".join(known) or "(none)"),
                key=_key(word),
            )
    changed = [word for word in given if word not in flags and _is_under(_key(word), BESIDE_RESUME)]
    return [*_without(known, *map(_key, changed)), *changed]


def _branched(arguments: list[str], text: str) -> list[str]:
    """The parent's arguments with the given ones on top: what is chosen anew goes with all below it."""
    folder, boundary = branch_point(text, *_uri(arguments))
    flags, inherited, given = _inherited(arguments, folder, "branch", ())
    if not all(_is_under(_key(word), _SAME_ARM) for word in given):
        inherited = _without(inherited, "arm")
    return [*flags, *inherited, *given, f"branch={quoted(f'{folder}@{boundary}')}"]


def _distilled(arguments: list[str], text: str) -> list[str]:
    """The teacher's arguments without what made it grow, and the student's on top."""
    name, _, number = text.rpartition("@") if re.search("@[0-9]+$", text) else (text, "", "")
    folder = _folder(name, f"distill={text}", "distill", *_uri(arguments))
    own = (*_STUDENT, "router", "arm", "checkpoint")
    flags, inherited, given = _inherited(arguments, folder, "distill", own)
    keys = {_key(word) for word in given}
    student = [f"{key}={value}" for key, value in _STUDENT.items() if key not in keys]
    boundary = int(number) if number else _newest_boundary(folder)
    return [*flags, *inherited, *student, *given, f"distill={quoted(f'{folder}@{boundary}')}"]


def _inherited(
    arguments: list[str], folder: Path, key: str, own: Iterable[str]
) -> tuple[list[str], list[str], list[str]]:
    """Flags, arguments taken over from an earlier run, arguments given; ``own`` is never taken over."""
    if not (folder / COMMAND).is_file():
        raise InputError(
            got=f"{key}={folder}, the folder of a sweep", allowed="the folder of one of its jobs", key=key
        )
    command, flags = _load(folder / COMMAND), _flags(arguments)
    given = _without([word for word in arguments if word not in flags], key)
    refused = (*map(_key, given), *_NEVER_INHERITED, *own, key)
    inherited = [word for word in map(str, command["overrides"]) if not _is_under(_key(word), refused)]
    return _with_config_dir(flags, command["config_dir"]), inherited, given


def _newest_boundary(folder: Path) -> int:
    """The last boundary that a run has saved."""
    names = [path.name for path in (folder / "checkpoints").glob("boundary_*.pt")]
    found = [int(match[1]) for name in names if (match := re.fullmatch(r"boundary_([0-9]+)-.*\.pt", name))]
    if not found:
        raise InputError(
            got=f"distill={folder}, a run that has saved nothing",
            allowed="a run with checkpoints",
            key="distill",
        )
    return max(found)


def _with_lasting_folder(arguments: list[str]) -> list[str]:
    """With a folder that the same command finds again: the one given, or one named after the arguments."""
    root, key, given = "outputs", "hydra.run.dir", ["hydra.run.dir", "output_dir"]
    if _is_sweep(arguments):
        root, key, given = "multirun", "hydra.sweep.dir", ["hydra.sweep.dir"]
    for word in arguments:
        if _key(word) in given and "${now" in word:
            raise InputError(
                got=f"{word} beside auto_resume, a folder that no second start finds again",
                allowed="a folder without the time in its name, or none: one is named after the command",
                key=_key(word),
            )
    if any(_key(word) in given for word in arguments):
        return arguments
    digest = hashlib.sha256("\0".join(arguments).encode(errors="surrogateescape")).hexdigest()
    return [*arguments, f"{key}={root}/auto-{digest[:12]}"]


def _folder(name: str, got: str, key: str, *uri: str) -> Path:
    """The folder of a run or a sweep, given as such or as a run id."""
    folder = Path(name)
    if not folder.is_dir():
        from cl_moe.tracking.store import find_run

        try:
            folder = Path(find_run(name, *uri)["output_dir"])
        except (InputError, KeyError):
            folder = Path(name)
    if not any((folder / file).is_file() for file in (COMMAND, SWEEP)):
        raise InputError(
            got=got,
            allowed="the output folder of a run of cl-moe, or a run id of the MLflow store tracking.uri",
            key=key,
        )
    return folder.resolve()


def _value(arguments: Iterable[str], key: str) -> str | None:
    """The last value given to a key, without its quotes; None for none and for null."""
    given = [word for word in arguments if _key(word) == key and "=" in word]
    if not given:
        return None
    text = given[-1].partition("=")[2]
    try:
        override = OverridesParser.create().parse_override(f"{key}={text}")
    except HydraException:
        return text.strip("'\"")
    if override.is_sweep_override():
        raise InputError(got=given[-1], allowed=f"one value; a sweep is over other keys than {key}", key=key)
    value = override.value()
    if value is None or value == "":
        return None
    return value if isinstance(value, str) else text  # a run id may look like a number


def _uri(arguments: Iterable[str]) -> list[str]:
    uri = _value(arguments, "tracking.uri")
    return [] if uri is None else [uri]


def _flags(arguments: list[str]) -> list[str]:
    """Hydra's own flags among the arguments, each with the value that follows it."""
    return [
        word
        for before, word in zip(["", *arguments], arguments, strict=False)
        if word.startswith("-") or before in _FLAGS_WITH_VALUE
    ]


def _with_config_dir(flags: list[str], *stored: str | None) -> list[str]:
    if any(flag.startswith(("--config-dir", "-cd")) for flag in flags):
        return flags
    return [*flags, *(f"--config-dir={path.removeprefix('file://')}" for path in stored if path)]


def _is_sweep(arguments: Iterable[str]) -> bool:
    return any(word in ("-m", "--multirun", "hydra.mode=MULTIRUN") for word in arguments)


def _key(argument: str) -> str:
    """``growth.events`` of ``++growth.events={2:4}``."""
    return argument.partition("=")[0].lstrip("+~")


def _is_under(key: str, places: Iterable[str]) -> bool:
    """Whether a key is one of the places, or stands below one of them."""
    return any(key == place or key.startswith((f"{place}.", f"{place}/")) for place in places)


def _without(words: Iterable[str], *keys: str) -> list[str]:
    return [word for word in words if _key(word) not in keys]


def _load(path: Path) -> Any:
    return OmegaConf.to_container(OmegaConf.load(path))
