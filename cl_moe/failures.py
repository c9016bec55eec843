"""What ended a run, in words a user can act on: no memory, no disk; and in which part of the work.

The part is read from the stack that an error comes with, so nothing has to keep track of it. Light to import:
the command line uses it before torch is there.
"""

from __future__ import annotations

import errno
import json
import re
import shutil
import sysconfig
import traceback
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from cl_moe.errors import InputError, OthersGoneError, RunFailedError
from cl_moe.memory import Holding, machine, readable

Settings = Mapping[str, object]


class Part(NamedTuple):
    """A part of the work: what it does, in words, and the keys that decide how much memory it takes.

    A key that ends with a dot stands for all counts under it.
    """

    words: str
    keys: tuple[str, ...] = ()


MODEL = ("layer.", "model.", "growth.")
FOLDER = Part("making the run's folder")
BUILD = Part("building the run", (*MODEL, "stream."))
BUILD_MODEL = Part("building the model", MODEL)
# (module or package, functions or none for all of them): the innermost frame that is listed tells the part.
PARTS: dict[tuple[str, tuple[str, ...]], Part] = {
    ("tasks", ()): Part("building the stream", ("stream.",)),
    ("cl_moe.growth", ()): Part("growing the model", MODEL),
    ("cl_moe.evaluation", ()): Part("evaluating", ("trainer.eval_batch_size",)),
    ("lightning.pytorch.loops.evaluation_loop", ()): Part("evaluating", ("trainer.eval_batch_size",)),
    ("torch.optim", ()): Part("training, in the optimizer's step", MODEL),
    ("lightning.pytorch.loops", ()): Part("training", ("trainer.batch_size",)),
    ("cl_moe.checkpoint", ()): Part("saving or loading a checkpoint"),
    ("cl_moe.tracking.artifacts", ()): Part("writing the results"),
    ("cl_moe.tracking.figures", ()): Part("drawing the figures"),
    ("cl_moe.tracking", ()): Part("keeping the numbers for MLflow"),
    ("cl_moe.stored", ()): FOLDER,
    ("cl_moe.ending", ()): FOLDER,
    ("cl_moe.models", ()): BUILD_MODEL,
    ("cl_moe.layers", ()): BUILD_MODEL,
    ("cl_moe.launch", ("build",)): BUILD,
    ("cl_moe.experiment", ()): Part("running the experiment"),
}
HOOKS = (
    *("check", "view", "begin", "batch", "loss", "gradients", "end", "predict", "rate", "answer"),
    *("state_dict", "load_state_dict"),
)

_DISK = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota of this user or folder is used up",
    errno.EFBIG: "a file may not grow so large here (ulimit -f, or the file system)",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "no permission",
    errno.EPERM: "no permission",
    errno.EIO: "the disk fails",
    errno.EMFILE: "too many open files (ulimit -n)",
    errno.ENFILE: "too many open files on this machine",
}
_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_FOLDER = (errno.EEXIST, errno.ENOTDIR, errno.ENAMETOOLONG)
_NO_MEMORY = re.compile(
    r"can't allocate memory|not enough memory|out of memory|Storage size calculation overflowed|bad_alloc"
    r"|ALLOC_FAILED|Overflow when unpacking long|array is too big|Maximum allowed dimension",
    re.IGNORECASE,
)
_GONE = re.compile(r"gloo|NCCL|connection (closed|reset)|broken pipe|socket timeout", re.IGNORECASE)
_REFUSED = re.compile(r"(?:tried|unable) to allocate ([\d.]+) ?(bytes|[KMGTPE]i?B)", re.IGNORECASE)


def named(
    error: BaseException,
    settings: Settings | None = None,
    holdings: Iterable[Holding] = (),
    folder: Path | None = None,
) -> InputError | RunFailedError | None:
    """The failure behind an error, with its cause named; None if it is of another kind.

    Args:
        error: as caught; errors that caused it are looked at too.
        settings: flattened configuration, so that keys can be named with their values.
        holdings: what the run holds in memory.
        folder: of the run, for an error that names no file.
    """
    if any(isinstance(link, InputError | RunFailedError | BrokenPipeError) for link in _chain(error)):
        return None  # it has its message already
    return others_gone(error) or out_of_memory(error, settings, holdings) or disk(error, folder)


def others_gone(error: BaseException) -> OthersGoneError | None:
    """An exchange between ranks that broke off: another one has ended, and may have said why."""
    if not any(isinstance(e, RuntimeError) and _GONE.search(str(e)) for e in _chain(error)):
        return None
    from cl_moe import agreement  # brings torch, which is there if ranks are

    if agreement.num_ranks() == 1:
        return None
    said = [json.loads(path.read_text()) for path in agreement.outcomes()]
    reasons = [f"rank {o['rank']}: {o['message']}" for o in said if o["kind"] in ("failed", "error")]
    return OthersGoneError("another rank is gone" + "".join(f"\n{reason}" for reason in reasons))


def out_of_memory(
    error: BaseException, settings: Settings | None = None, holdings: Iterable[Holding] = ()
) -> RunFailedError | None:
    """An allocation that was refused, on the CPU or a GPU: by whom, what holds how much, what to lower."""
    cause = next((link for link in _chain(error) if _is_out_of_memory(link)), None)
    if cause is None:
        return None
    part = part_of(list(_frames(error)))
    held = sorted((h for h in holdings if h.size), key=lambda holding: -holding.size)
    keys = [*_counts(part.keys, settings)]
    for holding in held:
        keys += _counts(holding.keys, settings)
    keys = list(dict.fromkeys(keys)) or ["trainer.batch_size", "the sizes under layer and model"]
    hint = " (a larger trainer.accumulate keeps the effective batch)" if "batch" in keys[0] else ""
    lines = [f"out of memory while {part.words}: {_refused(cause)}"]
    lines += [f"  {holding.words}: {readable(holding.size)}" for holding in held]
    lines += [
        machine(str(cause)),
        f"change: lower {keys[0]}{hint}" + "".join(f", or {key}" for key in keys[1:]),
    ]
    return RunFailedError("\n".join(lines))


def disk(error: BaseException, folder: Path | None = None) -> InputError | RunFailedError | None:
    """A file that could not be written or read: which one, why, how much space there is, what to change."""
    causes = [link for link in _chain(error) if isinstance(link, OSError)]
    known = [cause for cause in causes if _errno(cause) in _DISK]
    if not known and not isinstance(error, OSError):
        return None
    cause = (known or causes)[0]
    part, number = part_of(list(_frames(error))), _errno(cause)
    place = Path(str(cause.filename)) if isinstance(cause.filename, str) else folder
    if part == FOLDER and number in _NO_FOLDER:
        got = f"output_dir={place}: {cause.strerror}"
        return InputError(got=got, allowed="a folder that is there or can be made", key="output_dir")
    if number not in _DISK:
        return RunFailedError(f"{type(cause).__name__} while {part.words}: {cause}")
    lines = [f"{_DISK[number]}: {place or 'a file'}, while {part.words} ({cause.strerror or cause})"]
    if place is not None and (space := _space(place)):
        lines.append(space)
    change = "output_dir (another place), or the rights there"
    if number in _SPACE:
        change = "output_dir (another disk), checkpoint.keep (fewer), checkpoint.every_minutes (rarer)"
    return RunFailedError("\n".join([*lines, f"change: {change}"]))


def part_of(frames: Iterable[FrameType]) -> Part:
    """The part of the work that a stack, innermost frame first, stands in."""
    inner = None
    for frame in frames:
        module, function = str(frame.f_globals.get("__name__", "")), frame.f_code.co_name
        if module.startswith("cl_moe.strategies") and function in HOOKS:
            name = module.rpartition(".")[2]
            words = f"strategy {name} was at work ({function})"
            return Part(words, (f"strategy.{name}.", "trainer.batch_size"))
        part = _listed(module, function)
        if part == BUILD and inner is not None:
            return inner
        if part == BUILD_MODEL:  # layers also run within training and evaluation
            inner = part
        elif part is not None:
            return part
    return inner or Part("running")


def _listed(module: str, function: str) -> Part | None:
    for (room, functions), part in PARTS.items():
        if (module == room or module.startswith(f"{room}.")) and (not functions or function in functions):
            return part
    return None


def place_of(frames: list[FrameType]) -> str:
    """Where a stack stands: its innermost frames outwards up to the first that is no library's."""
    places = []
    for frame in frames[:30]:
        places.append(f"{frame.f_code.co_qualname} ({frame.f_code.co_filename}:{frame.f_lineno})")
        if not _is_library(frame):
            break
    return ", called from ".join([*places[:2], *places[2:][-1:]]) or "code without a Python frame"


def walk(frame: FrameType | None) -> Iterator[FrameType]:
    """A frame and its callers."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_library(frame: FrameType) -> bool:
    folders = (sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))
    own = frame.f_globals.get("__name__", "").split(".")[0] in ("cl_moe", "tasks")
    return not own and any(frame.f_code.co_filename.startswith(folder) for folder in folders)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what caused it. torch reports a failed write of an archive as an error of its own."""
    while error is not None:
        yield error
        archive = "inline_container" in str(error)
        error = error.__cause__ or (error.__context__ if archive else None)


def _frames(error: BaseException) -> Iterator[FrameType]:
    """Every frame that an error went through, innermost first."""
    for link in reversed(list(_chain(error))):
        yield from reversed([frame for frame, _ in traceback.walk_tb(link.__traceback__)])


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError | ValueError | TypeError) and bool(_NO_MEMORY.search(str(error)))


def _refused(error: BaseException) -> str:
    match = _REFUSED.search(str(error))
    if match is None:
        return "more was asked for than there is"
    size = readable(int(match[1])) if match[2] == "bytes" else f"{match[1]} {match[2]}"
    return f"{size} more were asked for"


def _counts(keys: Iterable[str], settings: Settings | None) -> list[str]:
    """``key=value`` of the counts that could be lower, the largest first within what stands under one key."""
    if settings is None:
        return [key for key in keys if not key.endswith(".")]
    found: list[tuple[int, str]] = []
    for key, value in settings.items():
        if type(value) is int and value > 1 and "seed" not in key:
            found += (
                [(-value, key)] if any(key == k or (k[-1] == "." and key.startswith(k)) for k in keys) else []
            )
    return [f"{key}={-value}" for value, key in sorted(found)][:4]


def _errno(error: OSError) -> int:
    """Its number; some libraries (Arrow) have it in the text only."""
    match = re.search(r"errno (\d+)", str(error), re.IGNORECASE)
    return error.errno or int(match[1] if match else 0)


def _space(place: Path) -> str:
    try:
        there = next(path for path in (place, *place.absolute().parents) if path.exists())
        usage = shutil.disk_usage(there)
    except (OSError, StopIteration):
        return ""
    return (
        f"free on its file system: {readable(usage.free)} of {readable(usage.total)}" if usage.total else ""
    )
