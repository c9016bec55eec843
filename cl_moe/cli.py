"""The command line: Hydra's entry, resuming, and one message with an exit status for whatever goes wrong.

Nothing heavy is imported here, so that ``--help`` and ``--cfg job`` are quick; ``launch`` brings the rest.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterable, Sequence
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from cl_moe import failures, stopping, sweeping
from cl_moe.arguments import rewritten
from cl_moe.errors import InputError, RunFailedError, StopRequestedError
from cl_moe.stopping import behind, listening
from cl_moe.words import is_sweep, split_flags

STOPPED_AT_THE_START = "stopped on request while starting; the same command starts again"
INPUT_WRONG, FAILED, INTERRUPTED, STOPPED = 2, 1, 130, 75


class _JobFailed(BaseException):
    """Carries a job's error past Hydra, which would put a line of its own before our message."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


@hydra.main(config_path="pkg://conf", config_name="config", version_base="1.3")
def _task(config: DictConfig) -> float:
    return _job_elsewhere(config) if sweeping.is_elsewhere() else _job(config)


def _job_elsewhere(config: DictConfig) -> float:
    """A job in a process that a launcher started."""
    overrides = list(HydraConfig.get().overrides.task)
    try:
        with sweeping.noted(), stopping.working():
            from cl_moe import launch

            return launch.run(config)
    except (Exception, StopRequestedError, KeyboardInterrupt) as raised:
        error = behind(raised)
        told = sweeping.portable(error, explain(error, overrides)[1], overrides)
    raise told


def _job(config: DictConfig) -> float:
    from cl_moe import launch

    hydra_config = HydraConfig.get()
    try:
        return launch.run(config)
    except Exception as error:
        if (stop := behind(error)) is not error:
            raise stop from error
        if hydra_config.mode != RunMode.MULTIRUN:
            _leave_nothing_but_results(hydra_config)
            raise _JobFailed(error) from error
        # The other jobs of a sweep go on, and Hydra raises the first failure at the very end: say it now.
        job = hydra_config.job
        _, message = explain(error, list(hydra_config.overrides.task))
        logging.getLogger(__name__).error("job %s (%s) failed\n%s", job.num, job.override_dirname, message)
        error.was_said = True  # type: ignore[attr-defined]
        raise


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run ``cl-moe`` and exit: 0 done, 2 wrong input, 1 failed, 75 stopped by SIGTERM, 130 by Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    before = os.environ.get("HYDRA_FULL_ERROR"), sys.argv
    raising, logging.raiseExceptions = logging.raiseExceptions, False  # a log on a full disk
    # With this variable Hydra hands its errors to us, instead of printing them and exiting with status 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        with warnings.catch_warnings(), listening():
            warnings.filterwarnings("ignore", category=UserWarning, module="hydra")
            status = _run(arguments, show_traceback=before[0] == "1")
    finally:
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.FileHandler):
                with suppress(OSError):  # the last lines of a log on a full disk
                    handler.close()
        logging.raiseExceptions = raising
        sys.argv = before[1]
        os.environ.pop("HYDRA_FULL_ERROR")
        if before[0] is not None:
            os.environ["HYDRA_FULL_ERROR"] = before[0]
    sys.exit(status)


def _run(arguments: list[str], show_traceback: bool) -> int:
    error: BaseException
    try:
        _guard_shadowing()
        words = rewritten(arguments)
        _refuse_empty_sweeps(words)
        sweeping.check(words)
        sys.argv = [sys.argv[0], *sweeping.completed(words)]
        with sweeping.leading(words):
            _task()
        return 0
    except _JobFailed as failed:
        error = failed.error
    except BrokenPipeError:  # whoever read our output has seen enough (| head)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Exception, KeyboardInterrupt, StopRequestedError) as raised:
        error = raised
    error = behind(error)
    if show_traceback:
        raise error
    status, message = explain(error, arguments)
    if not getattr(error, "was_said", False):
        with suppress(OSError):  # nobody reads it any more
            print(message, file=sys.stderr)
    return status


def explain(error: BaseException, arguments: Sequence[str]) -> tuple[int, str]:
    """Exit status and message of an error; configuration errors are the user's, the rest is a failed run."""
    if isinstance(error, KeyboardInterrupt | StopRequestedError):
        by_keyboard = isinstance(error, KeyboardInterrupt) or error.keyboard
        return INTERRUPTED if by_keyboard else STOPPED, str(error) or STOPPED_AT_THE_START
    cause = error
    while not isinstance(cause, InputError | RunFailedError) and cause.__cause__ is not None:
        cause = cause.__cause__
    failure = cause if isinstance(cause, InputError | RunFailedError) else None
    if failure is None and not isinstance(error, MissingConfigException):  # Hydra's, though an OSError
        failure = failures.named(error)
    if failure is not None:
        return (INPUT_WRONG if isinstance(failure, InputError) else FAILED), str(failure)
    if {type(error).__module__.split(".")[0], _origin(error)} & {"hydra", "omegaconf", "antlr4", "yaml"}:
        return INPUT_WRONG, _configuration_message(error, arguments)
    if _origin(error) == "optuna" and "No trials are completed" in str(error):
        return FAILED, "no trial of the search came to an end; what ended each stands above"
    return FAILED, (
        f"{type(error).__name__}: {error}\nThis is a defect of cl-moe, or of the machine: "
        "HYDRA_FULL_ERROR=1 shows where it happened."
    )


def _configuration_message(error: BaseException, arguments: Sequence[str]) -> str:
    """What is wrong on the command line, in three parts; with the names there are, where Hydra knows them."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        if options := _options(group) or list(error.options or ()):
            return _choice(f"{group}={name}", name, options, group)
    cause = error.__cause__ or error
    if isinstance(cause, OmegaConfBaseException) and "is not in struct" in str(cause):
        node, key, place = cause.parent_node, str(cause.key), cause.full_key or str(cause.key)
        names = sorted(str(name) for name in node if not str(name).startswith(("_", "hydra"))) if node else []
        return _choice(_argument(place, arguments), key, names, place)
    lines = [str(error).strip(), *([] if cause is error else [str(cause).strip()])]
    got = "\n     ".join(line for part in lines for line in part.splitlines() if line.strip())
    return (
        f"got: {' '.join(arguments)}\n     {got}\n"
        "allowed: groups and keys as `cl-moe --help` and `cl-moe --cfg job` print them\n"
        "change: the key or option named above"
    )


def _choice(got: str, name: str, names: Iterable[str], key: str) -> str:
    near = get_close_matches(name, list(names), n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return f"got: {got}\nallowed: {', '.join(names) or 'no key at all'}\nchange: {key}{hint}"


def _origin(error: BaseException) -> str:
    """The package whose code raised it."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return str(trace.tb_frame.f_globals.get("__name__", "")).split(".")[0] if trace else ""


def _argument(key: str, arguments: Sequence[str]) -> str:
    """The argument that names a key; the key itself if it came from elsewhere."""
    return next((a for a in arguments if a.lstrip("+~").partition("=")[0] == key), key)


def _options(group: str) -> list[str]:
    return sorted(path.stem for path in (Path(__file__).resolve().parents[1] / "conf" / group).glob("*.yaml"))


def _refuse_empty_sweeps(words: list[str]) -> None:
    """A pattern of options that matches none of them would be a sweep of no runs, which ends in silence."""
    flags, overrides = split_flags(words)
    if not is_sweep(words) or any(word.startswith("hydra.searchpath") for word in overrides):
        return
    for word in overrides:
        with suppress(HydraException):  # which Hydra will tell better
            override = OverridesParser.create().parse_override(word)
            pattern, group = override.value(), override.key_or_group
            if not isinstance(pattern, Glob):
                continue
            names = sorted({*_options(group), *_own_options(flags, group)})
            if not pattern.filter(names):
                allowed = f"a pattern of {', '.join(names)}" if names else "the name of a group of options"
                raise InputError(got=f"{word}, which matches nothing", allowed=allowed, key=group)


def _own_options(flags: Sequence[str], group: str) -> list[str]:
    """Options of a group in the folder given as ``--config-dir``."""
    pairs = zip(flags, [*flags[1:], ""], strict=True)
    folders = [word for flag, word in pairs if flag in ("--config-dir", "-cd")]
    folders += [flag.partition("=")[2] for flag in flags if flag.startswith("--config-dir=")]
    return [path.stem for folder in folders for path in (Path(folder) / group).glob("*.yaml")]


def _leave_nothing_but_results(hydra_config: HydraConf) -> None:
    """Remove the folder that Hydra made for a run that was refused before it wrote anything into it."""
    if any(str(word).startswith("hydra.run.dir=") for word in hydra_config.overrides.hydra):
        return
    here, folder = Path.cwd(), Path(hydra_config.runtime.output_dir)
    while here in folder.parents and folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
        folder = folder.parent


def _guard_shadowing() -> None:
    """A ``tasks`` or ``conf`` of the working folder must not stand in for ours under ``python -m``."""
    from importlib.util import find_spec

    ours = Path(__file__).resolve().parents[1]
    for name in ("tasks", "conf"):
        spec = find_spec(name)
        places = [spec.origin, *(spec.submodule_search_locations or [])] if spec else []
        if not any(place and Path(place).resolve().is_relative_to(ours / name) for place in places):
            raise InputError(
                got=f"a module called {name!r} in {Path.cwd()} that hides cl-moe's own",
                allowed="any other name for it, or another working folder",
                key=f"the file or folder {name}",
            )
