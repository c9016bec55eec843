"""torchrun as a run starts it: it ends with its parent, and says how ranks died in a file, not on the screen.

``python -m cl_moe.torchrun FOLDER <arguments of torchrun>``. Light but for torch.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path

DIED = "died.json"
"""``{rank: exit status}`` of ranks that ended otherwise than by themselves; a signal is a negative number."""
LOOK_SECONDS = 0.3
PARENT = "CL_MOE_PARENT"
"""In the environment: who started a process, which may be gone before that process asks."""


def end_with_parent() -> None:
    """Have this process killed soon after its parent is gone, whatever it is doing.

    A thread that looks is what Linux and macOS have in common; Linux's own way is bound to the parent's
    thread, not to the parent.
    """
    parent = int(os.environ.get(PARENT, os.getppid()))
    os.environ[PARENT] = str(os.getpid())  # of those that this process starts

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK_SECONDS)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def main(folder: str, arguments: list[str]) -> int:
    """Run torchrun; returns an exit status."""
    end_with_parent()
    logging.disable(logging.ERROR)  # what it would log of ranks that ended, their parent says better
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    try:
        torchrun(arguments)
    except ChildFailedError as error:
        died = {rank: failure.exitcode for rank, failure in error.failures.items()}
        Path(folder, DIED).write_text(json.dumps(died))
        return 1
    except SignalException as stopped:
        return 128 + int(stopped.sigval)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
