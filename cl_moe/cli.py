"""The command line: Hydra's entry, resuming, and one message with an exit status for whatever goes wrong.

Nothing heavy is imported here, so that ``--help`` and ``--cfg job`` are quick; ``launch`` brings the rest.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cl_moe.errors import InputError, RunFailedError, StopRequestedError
from cl_moe.schema import COMMAND

INPUT_WRONG, FAILED, INTERRUPTED, STOPPED = 2, 1, 130, 75


class _JobFailed(BaseException):
    """Carries a job's error past Hydra, which would put a line of its own before our message."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


@hydra.main(config_path="pkg://conf", config_name="config", version_base="1.3")
def _task(config: DictConfig) -> float:
    from cl_moe import launch

    hydra_config = HydraConfig.get()
    try:
        return launch.run(config)
    except Exception as error:
        if hydra_config.mode != RunMode.MULTIRUN:
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
    # With this variable Hydra hands its errors to us, instead of printing them and exiting with status 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        with warnings.catch_warnings(), _stopping_on_sigterm():
            warnings.filterwarnings("ignore", category=UserWarning, module="hydra")
            status = _run(arguments, show_traceback=before[0] == "1")
    finally:
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.FileHandler):
                handler.close()
        sys.argv = before[1]
        os.environ.pop("HYDRA_FULL_ERROR")
        if before[0] is not None:
            os.environ["HYDRA_FULL_ERROR"] = before[0]
    sys.exit(status)


def _run(arguments: list[str], show_traceback: bool) -> int:
    error: BaseException
    try:
        _guard_shadowing()
        sys.argv = [sys.argv[0], *resume_arguments(arguments)]
        _task()
        return 0
    except _JobFailed as failed:
        error = failed.error
    except BrokenPipeError:  # whoever read our output has seen enough (| head)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Exception, KeyboardInterrupt, StopRequestedError) as raised:
        error = raised
    if show_traceback:
        raise error
    status, message = explain(error, arguments)
    if not getattr(error, "was_said", False):
        print(message, file=sys.stderr)
    return status


@contextmanager
def _stopping_on_sigterm() -> Iterator[None]:
    """Turn SIGTERM, a scheduler's polite request, into an exception that closes the run in order."""

    def stop(*_: object) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough: the closing is not to be interrupted
        raise StopRequestedError

    if threading.current_thread() is not threading.main_thread():  # only there may handlers be set
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def explain(error: BaseException, arguments: Sequence[str]) -> tuple[int, str]:
    """Exit status and message of an error; configuration errors are the user's, the rest is a failed run."""
    if isinstance(error, KeyboardInterrupt):
        return (
            INTERRUPTED,
            "stopped by the keyboard; finished experiences are kept, resume=<run folder> goes on",
        )
    if isinstance(error, StopRequestedError):
        return STOPPED, str(error) or "stopped on request, before anything was trained"
    cause = error
    while not isinstance(cause, InputError) and cause.__cause__ is not None:
        cause = cause.__cause__
    if isinstance(cause, InputError):
        return INPUT_WRONG, str(cause)
    if isinstance(error, RunFailedError):
        return FAILED, str(error)
    if {type(error).__module__.split(".")[0], _origin(error)} & {"hydra", "omegaconf", "antlr4", "yaml"}:
        return INPUT_WRONG, _configuration_message(error, arguments)
    return FAILED, (
        f"{type(error).__name__}: {error}\nThis is a defect of cl-moe, or of the machine: "
        "HYDRA_FULL_ERROR=1 shows where it happened."
    )


def resume_arguments(arguments: list[str]) -> list[str]:
    """With ``resume=...`` among the arguments: those of the run to go on with, in its own folder.

    Raises:
        InputError: no such run, or an argument that differs from the stored ones.
    """
    chosen = [a.removeprefix("resume=") for a in arguments if a.startswith("resume=")]
    if not chosen or chosen[-1] in ("", "null"):
        return arguments
    uris = [a.removeprefix("tracking.uri=") for a in arguments if a.startswith("tracking.uri=")]
    folder = _run_folder(chosen[-1], *uris[-1:])
    command = OmegaConf.load(folder / COMMAND)
    known = [str(o) for o in command.overrides if not str(o).startswith("resume=")]
    flags = _flags(arguments)
    if {"-m", "--multirun"} & {*flags}:
        raise InputError(
            got="resume in a multirun", allowed="one run at a time, by its own folder or run id", key="resume"
        )
    if command.config_dir and not any(flag.startswith(("--config-dir", "-cd")) for flag in flags):
        flags.append(f"--config-dir={str(command.config_dir).removeprefix('file://')}")
    for argument in arguments:
        if argument not in flags and not argument.startswith("resume=") and argument not in known:
            raise InputError(
                got=f"{argument} beside resume",
                allowed="nothing else, or the run's own arguments: " + (" ".join(known) or "(none)"),
                key=argument.split("=")[0].lstrip("+~"),
            )
    known = [o for o in known if not o.startswith("output_dir=")]  # it may be relative to another folder
    names = ("resume", "hydra.run.dir", "output_dir")
    return [*flags, *known, *(f"{name}={_quoted(folder)}" for name in names), "hydra.output_subdir=null"]


def _flags(arguments: list[str]) -> list[str]:
    """Hydra's own flags among the arguments, each with the value that follows it."""
    with_value = ("--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn", "--package", "-p")
    return [
        word
        for before, word in zip(["", *arguments], arguments, strict=False)
        if word.startswith("-") or before in with_value
    ]


def _run_folder(name: str, *uri: str) -> Path:
    folder = Path(name.strip("'\""))
    wrong = InputError(
        got=f"resume={name}",
        allowed="the output folder of a run of cl-moe, or a run id of the MLflow store tracking.uri",
        key="resume",
    )
    if not folder.is_dir():
        from cl_moe.tracking.store import find_run

        try:
            folder = Path(find_run(name, *uri).get("output_dir", ""))
        except InputError:
            raise wrong from None
    if not (folder / COMMAND).is_file():
        raise wrong
    return folder.resolve()


def _quoted(path: Path) -> str:
    return "'" + str(path).replace("\\", "\\\\").replace("'", "\\'") + "'"


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
