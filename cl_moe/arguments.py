"""What stands for other arguments on the command line: ``resume``, ``branch`` and ``auto_resume``.

They are written out before Hydra composes anything, since they decide which arguments and which folder a
command has. Nothing heavy is imported here.
"""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from cl_moe.errors import InputError
from cl_moe.folder import COMMAND, mapping, read_command, store_of
from cl_moe.tracking.store import find_run

SWEEP = "multirun.yaml"
"""In a sweep's folder: Hydra's own record of its command."""
BESIDE_RESUME = ("resume", "auto_resume", "checkpoint", "tracking.uri")
"""Keys that say how and where a run is kept, not what it is: they may change when it goes on."""
_NEVER_INHERITED = ("resume", "auto_resume", "output_dir", "hydra", "branch")
_SAME_ARM = (*_NEVER_INHERITED, "checkpoint", "tracking", "seed", "mlflow_experiment")
_FLAGS_WITH_VALUE = (
    *("--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn", "--package", "-p"),
    *("--cfg", "-c", "--experimental-rerun"),
)
_INFO = ("--info", "-i")  # their value may be left out


def rewritten(arguments: list[str]) -> list[str]:
    """The arguments that Hydra gets.

    Raises:
        InputError: no such run to resume or to branch from, or an argument that cannot stand beside that.
    """
    resumed, branch = _value(arguments, "resume"), _value(arguments, "branch")
    if resumed is not None and branch is not None:
        raise InputError(
            got=f"branch={branch} beside resume={resumed}",
            allowed="branch to begin a child run; resume with the child's own folder to go on with it",
            key="branch (or resume)",
        )
    if resumed is not None:
        return _resumed(arguments, resumed)
    if str(_value(arguments, "auto_resume")).lower() == "true":
        arguments = _with_lasting_folder(arguments)
    return arguments if branch is None else _branched(arguments, branch)


def branch_point(text: str, *uri: str) -> tuple[Path, int]:
    """Folder and boundary that ``<run id or run folder>@<experience>`` names.

    Args:
        text: the value of ``branch``.
        uri: of the MLflow store in which a run id is looked up; without it the default one.

    Raises:
        InputError: it is not written like that, or there is no such run.
    """
    name, at, number = text.rpartition("@")
    if not name or not at or not re.fullmatch("[0-9]+", number):
        raise InputError(
            got=f"branch={text}",
            allowed="<run id or run folder>@<whole number>: so many experiences the child shares",
            key="branch",
        )
    return _folder("branch", name, f"@{number}", *uri), int(number)


def quoted(text: str) -> str:
    """A text as one value of an override."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _resumed(arguments: list[str], name: str) -> list[str]:
    """Those of the run, or the sweep, to go on with, in its own folder."""
    folder = _folder("resume", name, "", *_uri(arguments))
    if not (folder / COMMAND).is_file():
        return _resumed_sweep(arguments, folder)
    if _is_sweep(arguments):
        raise InputError(
            got="resume of one run in a multirun",
            allowed="one run at a time, by its own folder or run id, or the folder of a whole sweep",
            key="resume",
        )
    command, (flags, given) = read_command(folder, "resume"), _split(arguments)
    known = _known_and_given(given, command.overrides)
    known = _without(known, "output_dir")  # it may be relative to another folder
    if not _uri(arguments):
        known = _with_store(known, store_of(folder, "resume"))
    own = (f"{key}={quoted(str(folder))}" for key in ("resume", "hydra.run.dir", "output_dir"))
    return [*_with_config_dir(flags, command.config_dir), *known, *own]


def _resumed_sweep(arguments: list[str], folder: Path) -> list[str]:
    flags, given = _split(arguments)
    try:
        hydra = (mapping(folder / SWEEP) or {})["hydra"]
        config_dirs = [
            s["path"] for s in hydra["runtime"]["config_sources"] if s["provider"] == "command-line"
        ]
        task, own = map(str, hydra["overrides"]["task"]), map(str, hydra["overrides"]["hydra"])
        begun_in = Path(hydra["runtime"]["cwd"])
    except (LookupError, TypeError, AttributeError) as error:
        raise InputError(
            got=f"{folder / SWEEP}, which does not hold the whole command",
            allowed=f"the sweep's own command with {shlex.quote(f'hydra.sweep.dir={folder}')}: "
            "finished jobs are skipped",
            key="resume",
        ) from error
    known = _known_and_given([word for word in given if word != "hydra.mode=MULTIRUN"], [*task, *own])
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
    if begun_in != Path.cwd() and not _uri(arguments):
        stores = {store_of(path.parent, "resume") for path in sorted(folder.rglob(COMMAND))}
        known = _with_store(known, stores.pop() if len(stores) == 1 else None)
    flags = _with_config_dir(flags, *config_dirs)
    many = [] if _is_sweep(flags) else ["--multirun"]
    return [*flags, *many, *known, f"hydra.sweep.dir={quoted(place)}"]


def _with_store(known: list[str], uri: str | None) -> list[str]:
    """The arguments with the store in which the run began; they may name it relative to another folder."""
    return [*_without(known, "tracking.uri"), f"tracking.uri={quoted(uri)}"] if uri else known


def _known_and_given(arguments: list[str], stored: Iterable[str]) -> list[str]:
    """The stored arguments of a run, and of those beside ``resume`` what may change; the rest is refused."""
    known, given = _without(stored, "resume"), _without(arguments, "resume")
    for word in given:
        if word not in known and not is_under(_key(word), BESIDE_RESUME):
            raise InputError(
                got=f"{word} beside resume",
                allowed="nothing else, or the run's own arguments: " + (" ".join(known) or "(none)"),
                key=_key(word),
            )
    changed = [word for word in given if is_under(_key(word), BESIDE_RESUME)]
    return [*_without(known, *map(_key, changed)), *changed]


def _branched(arguments: list[str], text: str) -> list[str]:
    """The parent's arguments with the given ones on top: what is chosen anew goes with all below it."""
    folder, boundary = branch_point(text, *_uri(arguments))
    if not (folder / COMMAND).is_file():
        raise InputError(
            got=f"branch={text}, the folder of a sweep", allowed="the folder of one of its jobs", key="branch"
        )
    command, (flags, given) = read_command(folder, "branch"), _split(arguments)
    given = _without(given, "branch")
    keys = [_key(word) for word in given]
    inherited = [word for word in command.overrides if not is_under(_key(word), (*keys, *_NEVER_INHERITED))]
    if not all(is_under(key, _SAME_ARM) for key in keys):
        inherited = _without(inherited, "arm")
    flags = _with_config_dir(flags, command.config_dir)
    return [*flags, *inherited, *given, f"branch={quoted(f'{folder}@{boundary}')}"]


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
    flags, overrides = _split(arguments)
    return [*flags, *overrides, f"{key}={root}/auto-{digest[:12]}"]


def _folder(key: str, name: str, rest: str, *uri: str) -> Path:
    """The folder of a run or a sweep, given as such or as a run id, with ``rest`` behind it."""
    folder, known = Path(name), False
    if not folder.is_dir():
        with suppress(InputError, KeyError):
            folder, known = Path(find_run(name, *uri)["output_dir"]), True
    if not any((folder / file).is_file() for file in (COMMAND, SWEEP)):
        got, allowed = (
            f"{key}={name}{rest}",
            "the output folder of a run of cl-moe, or a run id of the MLflow ",
        )
        allowed += "store tracking.uri"
        if known:
            got += f", a run that the store knows, but not in its folder {folder}"
            allowed = f"{key}=<the folder where that run is now>{rest}"
        raise InputError(got=got, allowed=allowed, key=key)
    return folder.resolve()


def _value(arguments: Iterable[str], key: str) -> str | None:
    """The last value given to a key, without its quotes; None for none and for null.

    Raises:
        InputError: an empty value, or several.
    """
    given = [word for word in arguments if _key(word) == key and "=" in word]
    if not given:
        return None
    text = given[-1].partition("=")[2]
    name = text.rpartition("@")[0] if key == "branch" else text
    if key in ("resume", "branch") and name and name.lower() != "null" and Path(name).is_dir():
        return text  # with characters that mean something to Hydra, maybe
    try:
        override = OverridesParser.create().parse_override(f"{key}={text}")
    except HydraException:
        return text.strip("'\"")
    if override.is_sweep_override():
        raise InputError(got=given[-1], allowed=f"one value; a sweep is over other keys than {key}", key=key)
    value = override.value()
    if value is None:
        return None
    if value == "":
        raise InputError(got=given[-1], allowed="a value, or null for none", key=key)
    return value if isinstance(value, str) else text  # a run id may look like a number


def _uri(arguments: Iterable[str]) -> list[str]:
    uri = _value(arguments, "tracking.uri")
    return [] if uri is None else [uri]


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Hydra's own flags, each with the value that follows it; and the others.

    Flags shall stand first: Hydra refuses arguments on both sides of one.
    """
    flags, others = list[str](), list[str]()
    for before, word, after in zip(["", *arguments], arguments, [*arguments[1:], ""], strict=False):
        if word in _INFO and (not after or "=" in after or after.startswith("-")):
            flags.append("--info=all")  # what it means, and takes no other argument for its value
        elif word.startswith("-") or before in _FLAGS_WITH_VALUE or (before in _INFO and "=" not in word):
            flags.append(word)
        else:
            others.append(word)
    return flags, others


def _with_config_dir(flags: list[str], *stored: str | None) -> list[str]:
    if any(flag.startswith(("--config-dir", "-cd")) for flag in flags):
        return flags
    return [*flags, *(f"--config-dir={path.removeprefix('file://')}" for path in stored if path)]


def _is_sweep(arguments: Iterable[str]) -> bool:
    return any(word in ("-m", "--multirun", "hydra.mode=MULTIRUN") for word in arguments)


def _key(argument: str) -> str:
    """``growth.events`` of ``++growth.events={2:4}``."""
    return argument.partition("=")[0].lstrip("+~")


def is_under(key: str, places: Iterable[str]) -> bool:
    """Whether a key is one of the places, or stands below one of them."""
    return any(key == place or key.startswith((f"{place}.", f"{place}/")) for place in places)


def _without(words: Iterable[str], *keys: str) -> list[str]:
    return [word for word in words if _key(word) not in keys]
