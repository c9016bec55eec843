"""A run of several processes, from the one that was asked for it: start ranks, wait, hand on how they ended.

The ranks are started from outside, by torchrun, from a file: they know nothing of Hydra's sweeps and
launchers, and each job may have another number of them. This process trains nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from cl_moe import handing, stopping, stored
from cl_moe.agreement import OUTCOMES
from cl_moe.errors import InputError, RunFailedError, StopRequestedError
from cl_moe.torchrun import DIED, PARENT
from cl_moe.trainer import TrainerSpec

GRACE_SECONDS = 10.0
"""For the other ranks to end by themselves, once one has died."""
POLL_SECONDS = 0.1
OF_TORCHRUN = (
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
    *("GROUP_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
)
Outcome = Mapping[str, Any]


def run_in_ranks(config: DictConfig, spec: TrainerSpec, changed: list[str]) -> float:
    """One experiment by as many processes as the trainer says; returns the objective.

    Args:
        config: composed.
        spec: its trainer.
        changed: overrides that tell its arm from the default.

    Raises:
        InputError: what the ranks refused.
        RunFailedError: how the first of them failed or died.
        StopRequestedError: they were stopped, and have saved their state.
    """
    _ = spec.device  # refuse too few of them here
    if spec.engine is not None:
        spec.engine.check_start(spec.num_ranks)
    parent = stored.folder_of(config)
    made = not parent.exists()
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".ranks-", dir=parent))
    keep = False
    try:
        handing.write(config, folder / "config.yaml", changed)
        with stopping.deferring(), _torchrun(spec, folder) as process:
            _wait(process, folder)
        return _value(folder, spec)
    except RunFailedError:
        keep = any(outcome["kind"] == "error" for outcome in _outcomes(folder))
        raise
    finally:
        if not keep:  # tracebacks stay
            shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):
                if made:
                    parent.rmdir()


def command(spec: TrainerSpec, folder: Path) -> list[str]:
    """What starts this machine's ranks."""
    arguments = ["--nproc-per-node", str(spec.devices)]
    if spec.rendezvous is None:
        arguments += ["--standalone", "--local-addr", "127.0.0.1"]
    else:
        arguments += ["--nnodes", str(spec.num_nodes), "--rdzv-backend", "c10d"]
        arguments += ["--rdzv-endpoint", spec.rendezvous, "--rdzv-id", "cl-moe"]
    torchrun = [sys.executable, "-m", "cl_moe.torchrun", str(folder)]
    return [*torchrun, *arguments, "-m", "cl_moe.worker", str(folder / "config.yaml")]


def environment(spec: TrainerSpec) -> dict[str, str]:
    """This process's, without what another torchrun left in it, and with the places of its modules."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if key not in OF_TORCHRUN and not key.startswith(("TORCHELASTIC_", "ROLE_", "PET_"))
    }
    kept |= {"OMP_NUM_THREADS": str(spec.threads), "PYTHONSAFEPATH": "1", PARENT: str(os.getpid())}
    kept.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # each rank would warn of what is meant so
    kept["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
    loops = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    if spec.rendezvous is None and loops:  # a machine need not know its own name
        kept.setdefault("GLOO_SOCKET_IFNAME", loops[0])
    return kept


@contextmanager
def _torchrun(spec: TrainerSpec, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """torchrun and its ranks, in a session of their own: Ctrl-C reaches this process, which hands it on."""
    process = subprocess.Popen(command(spec, folder), env=environment(spec), start_new_session=True)
    try:
        yield process
    finally:
        _kill(process, folder)


def _wait(process: subprocess.Popen[bytes], folder: Path) -> None:
    """Until torchrun ends; hand on a request to stop, and end what does not end after a rank has died."""
    told, deadline = set[int](), float("inf")
    while process.poll() is None:
        time.sleep(POLL_SECONDS)
        if stopping.asked():
            number = signal.SIGINT if stopping.wish() == stopping.INTERRUPT else signal.SIGTERM
            for pid in set(_pids(folder)) - told:  # ranks that are still starting are told later
                _signal(pid, number)
                told.add(pid)
        if deadline == float("inf") and any(map(_is_early, _outcomes(folder))):
            deadline = time.monotonic() + GRACE_SECONDS
        if time.monotonic() > deadline:
            return


def _is_early(outcome: Outcome) -> bool:
    """Whether a rank failed, or stopped before it was a part of the run, so that the others wait in vain."""
    return outcome["kind"] not in ("done", "stopped") or outcome.get("message") == ""


def _kill(process: subprocess.Popen[bytes], folder: Path) -> None:
    if process.poll() is None:
        for pid in [*_pids(folder), process.pid]:
            _signal(pid, signal.SIGKILL)
        process.wait()


def _pids(folder: Path) -> list[int]:
    return [int(path.read_text() or 0) for path in sorted(folder.glob("pid_*"))]


def _signal(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _outcomes(folder: Path) -> list[Outcome]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob(OUTCOMES))]


def _value(folder: Path, spec: TrainerSpec) -> float:
    """What the ranks ended with; of failures the first one's, not those of ranks that missed it."""
    outcomes = _outcomes(folder)
    stopped = [o for o in outcomes if o["kind"] == "stopped"]
    failed = sorted(
        (o for o in outcomes if o["kind"] in ("input", "failed", "error")), key=lambda o: o["time"]
    )
    said = max((o["message"] for o in stopped), key=len, default="")
    # torchrun, too, asks the others to stop when one has ended; and ranks that stop together count on what
    # rank 0 saves, but one that is still starting has nothing to lose
    in_order = not failed and not _silent(folder, outcomes)
    if stopped and (in_order or (stopping.asked() and not said)):
        raise StopRequestedError(said, keyboard=any(o["keyboard"] for o in stopped))
    lost = next((o for o in outcomes if o["kind"] == "lost"), None)
    if failed:
        raise _failure(failed[0], spec.num_ranks, folder) from _RankError(failed[0]["trace"])
    done = [o for o in outcomes if o["kind"] == "done"]
    if len(done) == spec.devices:
        return float(done[0]["value"])
    raise RunFailedError("\n".join([_death(folder, outcomes, spec), *_kept(lost)]))


class _RankError(Exception):
    """The traceback of another process, for HYDRA_FULL_ERROR=1."""


def _failure(outcome: Outcome, num_ranks: int, folder: Path) -> Exception:
    if outcome["kind"] == "input":
        return InputError(got=outcome["got"], allowed=outcome["allowed"], key=outcome["key"])
    where = f"rank {outcome['rank']} of {num_ranks}: "
    if outcome["kind"] == "failed":
        return RunFailedError(where + outcome["message"])
    trace = folder / f"rank_{outcome['rank']}.txt"
    trace.write_text(outcome["trace"])
    return RunFailedError(
        f"{where}{outcome['message']}\nthis is a defect of cl-moe: its traceback is in {trace}"
    )


def _death(folder: Path, outcomes: list[Outcome], spec: TrainerSpec) -> str:
    """Of a rank that could not say how it ended."""
    silent = _silent(folder, outcomes)
    if not silent:
        return "the ranks could not be started, or were ended together; what torchrun said stands above"
    rank, status = min(silent.items(), key=lambda pair: (pair[1] >= 0, int(pair[0])))
    if status < 0:
        name = signal.Signals(-status).name
        why = " (the system does that when memory runs out)" if name == "SIGKILL" else ""
        return f"rank {rank} of {spec.num_ranks} was killed by {name}{why}"
    return f"rank {rank} of {spec.num_ranks} ended with status {status}; what it said stands above"


def _silent(folder: Path, outcomes: list[Outcome]) -> dict[str, int]:
    """By which status, or negative signal, ranks ended that could not say how, as far as torchrun knows."""
    died: dict[str, int] = {}
    with suppress(OSError, ValueError):
        died = json.loads((folder / DIED).read_text())
    return {rank: status for rank, status in died.items() if int(rank) not in {o["rank"] for o in outcomes}}


def _kept(lost: Outcome | None) -> list[str]:
    """The lines about what is kept and how to go on, which a rank that was left alone has said."""
    lines = lost["message"].splitlines() if lost else []
    first = next((i for i, line in enumerate(lines) if line.startswith("kept: ")), len(lines))
    return lines[first:]
