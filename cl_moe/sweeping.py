"""Sweeps by Hydra's plugins: what they need, and how jobs that run in other processes end.

joblib, submitit and ray run each job in a process of their own, where nobody has called ``main``: what such a
job ends by must find its way back as an error that can be pickled, and whoever asks the sweep to stop means
its jobs. Nothing heavy is imported here.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from cl_moe import files, stopping
from cl_moe.arguments import SWEEP
from cl_moe.errors import InputError, JobStoppedError, RunFailedError, StopRequestedError
from cl_moe.words import is_sweep, key_of, split_flags, value_of

_JOBLIB, _RAY = ("joblib", "hydra_joblib_launcher"), ("ray", "hydra_ray_launcher")
_SUBMITIT, _OPTUNA = ("submitit", "hydra_submitit_launcher"), ("optuna", "hydra_optuna_sweeper")
PLUGINS = {
    "hydra/launcher": {
        **dict.fromkeys(("joblib", "workstation"), _JOBLIB),
        **dict.fromkeys(("submitit_local", "submitit_slurm", "slurm", "slurm_rehearsal"), _SUBMITIT),
        **dict.fromkeys(("ray", "ray_aws", "ray_cluster"), _RAY),
    },
    "hydra/sweeper": dict.fromkeys(("optuna", "search"), _OPTUNA),
}
"""Of each option the extra that brings it, and its package below ``hydra_plugins``."""
JOBS = "CL_MOE_JOBS"
"""In the environment of a sweep's jobs: ``<process id>:<folder>`` of who launched them."""
_STOP = "stop"
_LOOKS = {"--cfg", "-c", "--info", "-i", "--info=all", "--help", "-h", "--hydra-help"}

_leading = False


def check(words: list[str]) -> None:
    """Refuse a launcher or sweeper that is not installed, or that would do nothing, before Hydra says less.

    Raises:
        InputError: names the extra, or the key.
    """
    flags, given = split_flags(words)
    for group, options in PLUGINS.items():
        name = str(value_of(given, group))
        if name not in options:
            continue
        extra, package = options[name]
        if not _is_there(package):
            own = "-c constraints-ray.txt " if extra == "ray" else ""
            raise InputError(
                got=f"{group}={name}, which is not installed",
                allowed=f"after pip install {own}'cl-moe[{extra}]'; jobs one after the other without it",
                key=group,
            )
        if not is_sweep(words) and _LOOKS.isdisjoint(flags):
            raise InputError(
                got=f"{group}={name} in a single run", allowed="beside -m, for the jobs of a sweep", key=group
            )
    if value_of(given, "hydra/sweeper") not in PLUGINS["hydra/sweeper"]:
        return
    if value_of(given, "hydra.sweeper.storage") is not None:
        raise InputError(
            got="a storage for the optuna sweeper, whose optuna (2.10) opens none beside SQLAlchemy 2.1",
            allowed="null: a search that is started again in its folder finds its finished trials there",
            key="hydra.sweeper.storage",
        )


def completed(words: list[str]) -> list[str]:
    """The words, with what the plugin ``optuna`` leaves open in a way that does not fit: see ``search.yaml``.

    It minimizes, where our objectives are better when larger, and draws other trials whenever it is started.
    """
    _, given = split_flags(words)
    if value_of(given, "hydra/sweeper") != "optuna":
        return words
    wanted = {"hydra.sweeper.direction": "maximize", "hydra.sweeper.sampler.seed": "0"}
    if value_of(given, "hydra/sweeper/sampler") == "grid":
        del wanted["hydra.sweeper.sampler.seed"]
    known = {key_of(word) for word in given}
    return [*words, *(f"{key}={value}" for key, value in wanted.items() if key not in known)]


def _is_there(package: str) -> bool:
    try:
        return find_spec(f"hydra_plugins.{package}") is not None
    except ModuleNotFoundError:  # there are no plugins at all
        return False


@contextmanager
def leading(words: list[str]) -> Iterator[None]:
    """Be the process that was asked: jobs that it launches elsewhere note themselves and are told to stop."""
    global _leading
    launcher = str(value_of(split_flags(words)[1], "hydra/launcher"))
    _leading = True
    try:
        with _among_jobs() if launcher in PLUGINS["hydra/launcher"] else nullcontext():
            yield
    except (StopRequestedError, KeyboardInterrupt) as stop:
        if launcher in ("slurm", "submitit_slurm") and not str(stop):
            stop.args = (
                "stopped on request; jobs that SLURM has go on (squeue lists them, scancel ends them)",
            )
        raise
    finally:
        _leading = False


@contextmanager
def _among_jobs() -> Iterator[None]:
    folder, before = Path(tempfile.mkdtemp(prefix="cl-moe-jobs-")), os.environ.get(JOBS)
    os.environ[JOBS] = f"{os.getpid()}:{folder}"
    try:
        with stopping.handing_on(lambda number: _tell(folder, number)):
            yield
    finally:
        os.environ.pop(JOBS)
        if before is not None:
            os.environ[JOBS] = before
        shutil.rmtree(folder, ignore_errors=True)


class Record(Callback):
    """Keeps a sweep's command, which ``resume`` goes on with, as of the sweepers the basic one alone does."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Write it, for every sweeper; where a sweep goes on, its first command stays."""
        file = Path(str(config.hydra.sweep.dir), SWEEP)
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            files.write_atomically(file, OmegaConf.to_yaml(config).encode())


def is_elsewhere() -> bool:
    """Whether this process runs a job for the one that was asked."""
    return not _leading


@contextmanager
def noted() -> Iterator[None]:
    """Be found by who launched this job, if that is on this machine, while it runs."""
    _, _, place = os.environ.get(JOBS, "").partition(":")
    mark = Path(place, f"pid_{os.getpid()}")
    with suppress(OSError):
        if place and Path(place).is_dir():
            mark.touch()
        if place and (said := (Path(place) / _STOP)).exists():
            stopping.note(int(said.read_text()))
    try:
        yield
    finally:
        with suppress(OSError):
            mark.unlink()


def portable(error: BaseException, message: str, overrides: Sequence[str]) -> Exception:
    """What a job elsewhere ended by, as an error that can be pickled; a failure is said here, too.

    Args:
        error: as it was raised.
        message: what it says.
        overrides: of the job.
    """
    if isinstance(error, StopRequestedError | KeyboardInterrupt):
        by_keyboard = isinstance(error, KeyboardInterrupt) or error.keyboard
        return JobStoppedError(message, by_keyboard)
    logging.getLogger(__name__).error("job %s failed\n%s", " ".join(overrides), message)
    link: BaseException | None = error
    while link is not None and not isinstance(link, InputError):
        link = link.__cause__
    told: Any = (
        InputError(got=link.got, allowed=link.allowed, key=link.key) if link else RunFailedError(message)
    )
    told.add_note("".join(traceback.format_exception(error)))  # for HYDRA_FULL_ERROR=1
    same_screen = os.environ.get(JOBS, "").partition(":")[0] == str(os.getppid())
    told.was_said = same_screen
    return told


def _tell(folder: Path, number: int) -> bool:
    """Hand a signal to the jobs that run here, and leave it for those that begin; whether there are any."""
    told = False
    with suppress(OSError):
        if marks := sorted(folder.glob("pid_*")):
            files.write_atomically(folder / _STOP, str(number).encode())
        for mark in marks:
            with suppress(ProcessLookupError):
                os.kill(
                    int(mark.name.removeprefix("pid_")), signal.SIGTERM if number != signal.SIGINT else number
                )
                told = True
    return told
