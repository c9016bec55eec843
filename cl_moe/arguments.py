"""What stands for other arguments on the command line: ``resume``, ``branch``, ``distill``, ``auto_resume``.

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

from cl_moe.errors import InputError
from cl_moe.folder import COMMAND, mapping, read_command, store_of
from cl_moe.repeating import reproduced
from cl_moe.tracking.store import find_run
from cl_moe.words import (
    is_sweep,
    is_under,
    key_of,
    quoted,
    split_flags,
    uri_of,
    value_of,
    with_config_dir,
    without,
)

SWEEP = "multirun.yaml"
"""In a sweep's folder: Hydra's own record of its command."""
BESIDE_RESUME = (
    *("resume", "auto_resume", "checkpoint", "tracking.uri", "tracking.system_metrics"),
    *("trainer.devices", "trainer.num_nodes", "trainer.rendezvous"),
)
"""Keys that say how and where a run is kept, and by how many processes it is trained, not what it is: they
may change when it goes on."""
_OWN = ("resume", "auto_resume", "output_dir", "hydra", "branch", "reproduce")
_NEVER_INHERITED = (*_OWN, "upcycle", "upcycle_noise")
CUMULATIVE = "eval.cumulative"
"""Names a run that this one is compared with."""
_STUDENT = {
    "layer": "dense",
    "growth": "never",
    "freeze": "never",
    "prune": "never",
    "strategy": "distill_from",
}
"""What a student has instead of its teacher's, unless it is given."""
_SAME_ARM = (*_OWN, "checkpoint", "eval", "tracking", "seed", "mlflow_experiment")


def rewritten(arguments: list[str]) -> list[str]:
    """The arguments that Hydra gets.

    Raises:
        InputError: no such run to resume or to branch from, or an argument that cannot stand beside that.
    """
    resumed, branch = value_of(arguments, "resume"), value_of(arguments, "branch")
    teacher, original = value_of(arguments, "distill"), value_of(arguments, "reproduce")
    if original is not None and resumed is None:
        return reproduced(arguments, original)
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
    if (compared := value_of(arguments, CUMULATIVE)) is not None:  # the same run from every working folder
        flags, given = split_flags(without(arguments, CUMULATIVE))
        folder = run_folder(compared, *uri_of(arguments), key=CUMULATIVE)
        arguments = [*flags, *given, f"{CUMULATIVE}={quoted(str(folder))}"]
    if str(value_of(arguments, "auto_resume")).lower() == "true":
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
    return _folder(key, name, f"@{number}", *uri), int(number)


def run_folder(text: str, *uri: str, key: str) -> Path:
    """Folder of the run that ``<run id or run folder>`` names; else as ``branch_point``."""
    return _folder(key, text, "", *uri)


def _resumed(arguments: list[str], name: str) -> list[str]:
    """Those of the run, or the sweep, to go on with, in its own folder."""
    folder = _folder("resume", name, "", *uri_of(arguments))
    if not (folder / COMMAND).is_file():
        return _resumed_sweep(arguments, folder)
    if is_sweep(arguments):
        raise InputError(
            got="resume of one run in a multirun",
            allowed="one run at a time, by its own folder or run id, or the folder of a whole sweep",
            key="resume",
        )
    command, (flags, given) = read_command(folder, "resume"), split_flags(arguments)
    known = _known_and_given(given, command.overrides)
    known = without(known, "output_dir")  # it may be relative to another folder
    if not uri_of(arguments):
        known = _with_store(known, store_of(folder, "resume"))
    own = (f"{key}={quoted(str(folder))}" for key in ("resume", "hydra.run.dir", "output_dir"))
    return [*with_config_dir(flags, command.config_dir), *known, *own]


def _resumed_sweep(arguments: list[str], folder: Path) -> list[str]:
    flags, given = split_flags(arguments)
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
    if any(key_of(word) == "output_dir" for word in known) and begun_in != Path.cwd():
        raise InputError(
            got=f"a sweep with an output_dir of its own that began in {begun_in}, resumed in {Path.cwd()}",
            allowed=f"the working folder {begun_in}, so that its jobs find their folders",
            key="the working folder",
        )
    # As it was written, if that is this folder: the tag ``sweep`` of the jobs to come is this text.
    near = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
    written = value_of(known, "hydra.sweep.dir") or str(near)
    place = written if Path(written).resolve() == folder else str(folder)
    known = without(known, "hydra.sweep.dir", "hydra.mode")
    if begun_in != Path.cwd() and not uri_of(arguments):
        stores = {store_of(path.parent, "resume") for path in sorted(folder.rglob(COMMAND))}
        known = _with_store(known, stores.pop() if len(stores) == 1 else None)
    flags = with_config_dir(flags, *config_dirs)
    many = [] if is_sweep(flags) else ["--multirun"]
    return [*flags, *many, *known, f"hydra.sweep.dir={quoted(place)}"]


def _with_store(known: list[str], uri: str | None) -> list[str]:
    """The arguments with the store in which the run began; they may name it relative to another folder."""
    return (
        [*without(known, "tracking.uri", "tracking.system_metrics"), f"tracking.uri={quoted(uri)}"]
        if uri
        else known
    )


def _known_and_given(arguments: list[str], stored: Iterable[str]) -> list[str]:
    """The stored arguments of a run, and of those beside ``resume`` what may change; the rest is refused."""
    known, given = without(stored, "resume"), without(arguments, "resume")
    for word in given:
        if word not in known and not is_under(key_of(word), BESIDE_RESUME):
            raise InputError(
                got=f"{word} beside resume",
                allowed="nothing else, or the run's own arguments: " + (" ".join(known) or "(none)"),
                key=key_of(word),
            )
    changed = [word for word in given if is_under(key_of(word), BESIDE_RESUME)]
    return [*without(known, *map(key_of, changed)), *changed]


def _branched(arguments: list[str], text: str) -> list[str]:
    """The parent's arguments with the given ones on top: what is chosen anew goes with all below it."""
    folder, boundary = branch_point(text, *uri_of(arguments))
    flags, inherited, given = _inherited(arguments, folder, "branch", ())
    if not all(is_under(key_of(word), _SAME_ARM) for word in given):
        inherited = without(inherited, "arm")
    return [*flags, *inherited, *given, f"branch={quoted(f'{folder}@{boundary}')}"]


def _distilled(arguments: list[str], text: str) -> list[str]:
    """The teacher's arguments without what made it grow, and the student's on top."""
    name, _, number = text.rpartition("@") if re.search("@[0-9]+$", text) else (text, "", "")
    folder = _folder("distill", name, text.removeprefix(name), *uri_of(arguments))
    own = (*_STUDENT, "router", "arm", "checkpoint")
    flags, inherited, given = _inherited(arguments, folder, "distill", own)
    keys = {key_of(word) for word in given}
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
    command, (flags, given) = read_command(folder, key), split_flags(arguments)
    given = without(given, key)
    refused = (*map(key_of, given), *_NEVER_INHERITED, *own, key)
    inherited = [word for word in command.overrides if not is_under(key_of(word), refused)]
    return with_config_dir(flags, command.config_dir), inherited, given


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
    if is_sweep(arguments):
        root, key, given = "multirun", "hydra.sweep.dir", ["hydra.sweep.dir"]
    for word in arguments:
        if key_of(word) in given and "${now" in word:
            raise InputError(
                got=f"{word} beside auto_resume, a folder that no second start finds again",
                allowed="a folder without the time in its name, or none: one is named after the command",
                key=key_of(word),
            )
    if any(key_of(word) in given for word in arguments):
        return arguments
    digest = hashlib.sha256("\0".join(arguments).encode(errors="surrogateescape")).hexdigest()
    flags, overrides = split_flags(arguments)
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
