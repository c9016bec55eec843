"""One rank of a run: ``python -m cl_moe.worker CONFIG``, as torchrun starts it.

It is the run that its parent was asked for, once more, from the configuration that the parent wrote; how it
ends goes into a file, since torchrun hands nothing back.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import traceback
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from cl_moe import files, stopping
from cl_moe.errors import InputError, OthersGoneError, RunFailedError, StopRequestedError
from cl_moe.torchrun import end_with_parent

TIMEOUT = timedelta(minutes=30)


def main(path: Path) -> int:
    """Run, and note how it ended; returns an exit status, 0 if it ended in order (stopped, too)."""
    end_with_parent()
    rank = int(os.environ["RANK"])
    stopping.be_silent()
    with stopping.listening():
        files.write_atomically(path.parent / f"pid_{rank}", str(os.getpid()).encode())
        try:
            outcome = {"kind": "done", "value": _run(path, rank)}
        except BaseException as error:
            with stopping.deferring():  # torchrun asks the others to end when one has died
                outcome = describe(error)
        with stopping.deferring():
            note(path.parent, rank, outcome)
    with suppress(OSError):
        sys.stdout.flush()
    return 0 if outcome["kind"] in ("done", "stopped") else 1


def describe(error: BaseException) -> dict[str, Any]:
    """How a rank ended by an error, in plain Python."""
    from cl_moe import failures

    stop = stopping.behind(error)
    text = "".join(traceback.format_exception(error))
    if isinstance(stop, StopRequestedError | KeyboardInterrupt):
        by_keyboard = isinstance(stop, KeyboardInterrupt) or stop.keyboard
        return {"kind": "stopped", "message": str(stop), "keyboard": by_keyboard}
    if isinstance(error, InputError):
        return {"kind": "input", "got": error.got, "allowed": error.allowed, "key": error.key, "trace": text}
    failure = failures.named(error) or error
    kind = "lost" if isinstance(failure, OthersGoneError) else "failed"
    if not isinstance(failure, RunFailedError):
        kind = "error"
    message = str(failure) if kind != "error" else f"{type(error).__name__}: {error}"
    return {"kind": kind, "message": message, "trace": text}


def note(folder: Path, rank: int, outcome: dict[str, Any]) -> None:
    """Write how a rank ended, whole, where its parent and the other ranks look for it."""
    content = json.dumps(outcome | {"rank": rank, "time": time.time()})
    with suppress(OSError):  # on a full disk the parent has torchrun's word
        files.write_atomically(folder / f"rank_{rank}.json", content.encode())


def _run(path: Path, rank: int) -> float:
    import torch
    import torch.distributed as dist
    from hydra.utils import instantiate

    from cl_moe import agreement, engines, handing, launch

    config, changed = handing.read(path)
    if rank:  # warnings are the same on all ranks, and rank 0's are enough
        logging.getLogger().setLevel(logging.ERROR)
    spec = instantiate(config.trainer)
    torch.set_num_threads(spec.threads)
    if spec.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(engines.BACKENDS[spec.device], timeout=TIMEOUT)
    agreement.join(path.parent)
    value = launch.run(config, changed)
    agreement.leave()
    dist.destroy_process_group()
    return value


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).absolute()))
