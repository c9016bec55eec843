"""The command line: Hydra's entry, resuming, and one message with an exit status for whatever goes wrong.

Nothing heavy is imported here, so that ``--help`` and ``--cfg job`` are quick; ``launch`` brings the rest.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import hydra
from omegaconf import DictConfig, OmegaConf

from cl_moe.errors import InputError, RunFailedError

INPUT_WRONG, FAILED, STOPPED = 2, 1, 130


@hydra.main(config_path="pkg://conf", config_name="config", version_base="1.3")
def _task(config: DictConfig) -> float:
    from cl_moe import launch

    try:
        return launch.run(config)
    except (InputError, RunFailedError) as error:
        # In a sweep the other jobs go on, and Hydra raises the first failure at the very end: say it now.
        logging.getLogger(__name__).error("%s", error)
        raise


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run ``cl-moe`` with arguments and exit: 0 done, 2 wrong input, 1 failed, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    show_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    # With this variable Hydra hands its errors to us, instead of printing them and exiting with status 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    warnings.filterwarnings("ignore", category=UserWarning, module="hydra")
    try:
        _guard_shadowing()
        sys.argv = [sys.argv[0], *resume_arguments(arguments)]
        _task()
    except (Exception, KeyboardInterrupt) as error:
        if show_traceback:
            raise
        status, message = explain(error, arguments)
        if message and not getattr(error, "was_said", False):
            print(message, file=sys.stderr)
        sys.exit(status)
    sys.exit(0)


def explain(error: BaseException, arguments: Sequence[str]) -> tuple[int, str]:
    """Exit status and message of an error; configuration errors are the user's, the rest is a failed run."""
    if isinstance(error, KeyboardInterrupt):
        return STOPPED, "stopped by the keyboard; finished experiences are kept, resume=<run folder> goes on"
    cause = error
    while not isinstance(cause, InputError) and cause.__cause__ is not None:
        cause = cause.__cause__
    if isinstance(cause, InputError):
        return INPUT_WRONG, str(cause)
    if isinstance(error, RunFailedError):
        return FAILED, str(error)
    if type(error).__module__.split(".")[0] in ("hydra", "omegaconf", "antlr4"):
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
    stored = [str(o) for o in OmegaConf.load(folder / ".hydra" / "overrides.yaml")]
    known = [o for o in stored if not o.startswith("resume=")]
    flags = [a for a in arguments if a.startswith("-")]
    for argument in arguments:
        if argument not in flags and not argument.startswith("resume=") and argument not in known:
            raise InputError(
                got=f"{argument} beside resume",
                allowed="nothing else, or the run's own arguments: " + (" ".join(known) or "(none)"),
                key=argument.split("=")[0].lstrip("+~"),
            )
    here = [f"hydra.run.dir={_quoted(folder)}", "hydra.output_subdir=null"]
    return [*flags, *known, f"resume={_quoted(folder)}", *here]


def _run_folder(name: str, *uri: str) -> Path:
    folder = Path(name.strip("'\""))
    if not folder.is_dir():
        from cl_moe.tracking.store import find_run

        folder = Path(find_run(name, *uri).get("output_dir", ""))
    if not (folder / ".hydra" / "overrides.yaml").is_file():
        raise InputError(
            got=f"resume={name}",
            allowed="the output folder or MLflow run id of a run of cl-moe",
            key="resume",
        )
    return folder.resolve()


def _quoted(path: Path) -> str:
    return "'" + str(path).replace("\\", "\\\\").replace("'", "\\'") + "'"


def _configuration_message(error: BaseException, arguments: Sequence[str]) -> str:
    lines = [str(error).strip()]
    if error.__cause__ is not None:
        lines.append(str(error.__cause__).strip())
    got = "\n     ".join(line for part in lines for line in part.splitlines() if line.strip())
    return (
        f"got: {' '.join(arguments)}\n     {got}\n"
        "allowed: groups and keys as `cl-moe --help` and `cl-moe --cfg job` print them\n"
        "change: the key or option named above"
    )


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
