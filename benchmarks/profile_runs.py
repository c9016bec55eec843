"""Where the CPU seconds of a whole run go: an arm of the demo, and split digits.

Each run is one process that begins with nothing imported and no store, as a user's first run does. A part is
a function; its seconds leave out those of the parts inside it, so that all add up to the process's time. What
is no part stands under "other". The three largest are marked.

    python benchmarks/profile_runs.py
    python benchmarks/profile_runs.py experiment=demo_grow trainer.epochs=1    # one run of your own
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from pathlib import Path
from typing import Any
from unittest import mock

from rich.console import Console
from rich.table import Table

RUNS = (["experiment=demo_lwf"], ["stream=split_digits"], ["stream=split_digits", "layer=moe"])
PARTS = {
    "new or found store of MLflow": ["cl_moe.tracking.store:open_store"],
    "loading of MLflow, a run begun": ["cl_moe.tracking.tracker:MLflowTracker.start"],
    "points and files to MLflow": [
        f"cl_moe.tracking.tracker:MLflowTracker.{act}" for act in ("send", "artifact", "finish")
    ],
    "the loop over steps": ["lightning.pytorch:Trainer.fit"],
    "forward passes and losses": ["cl_moe.learner:Learner.training_step"],
    "backward passes": ["torch:Tensor.backward"],
    "optimizer": ["torch.optim.adamw:AdamW.step", "torch.optim.sgd:SGD.step"],
    "evaluations": ["lightning.pytorch:Trainer.test"],
    "checkpoints": ["cl_moe.checkpoint:Checkpoints.save"],
    "building of the run": ["cl_moe.launch:build"],
    "artifacts, figures, table": ["cl_moe.run:Run.finish"],
}


class Clock:
    """CPU seconds of parts, each without those of the parts inside it."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._open, self._since = ["other"], 0.0

    def turn(self) -> None:
        """Charge what passed to the part that is open."""
        now = time.process_time()
        self.seconds[self._open[-1]] += now - self._since
        self._since = now

    def part(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with its time charged to ``name``."""

        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.turn()
            self._open.append(name)
            try:
                return function(*args, **kwargs)
            finally:
                self.turn()
                self._open.pop()

        return timed


def work(words: list[str]) -> int:
    """One run, in this process; its parts go to the standard error's last line. Returns its status."""
    clock = Clock()
    load = clock.part("loading of code", importlib.import_module)
    load("cl_moe.launch")
    with ExitStack() as patches:
        for name, places in PARTS.items():
            for place in places:
                module, _, path = place.partition(":")
                owner = load(module)
                *outer, attribute = path.split(".")
                for step in outer:
                    owner = getattr(owner, step)
                timed = clock.part(name, getattr(owner, attribute))
                patches.enter_context(mock.patch.object(owner, attribute, timed))
        try:
            load("cl_moe.cli").main(words)
        except SystemExit as ended:
            status = int(ended.code or 0)
    clock.turn()
    print(json.dumps(clock.seconds), file=sys.stderr)
    return status


def profile(words: list[str]) -> dict[str, float]:
    """CPU seconds of a run's parts."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--work", *words, f"output_dir={folder}/run"]
        paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
    if done.returncode:
        sys.exit(f"{' '.join(words)}: status {done.returncode}\n{done.stdout}{done.stderr}")
    seconds: dict[str, float] = json.loads(done.stderr.strip().splitlines()[-1])
    return seconds


def main(words: list[str]) -> None:
    """Print a table for each run."""
    for run in [words] if words else RUNS:
        seconds = profile(run)
        ordered, total = Counter(seconds).most_common(), sum(seconds.values())
        largest = [name for name, _ in ordered if name != "other"][:3]
        table = Table(title=f"cl-moe {' '.join(run)}: {total:.1f} CPU seconds")
        for column in ("part", "seconds", "share"):
            table.add_column(column, justify="left" if column == "part" else "right")
        for name, took in ordered:
            mark = "[bold]" if name in largest else ""
            table.add_row(f"{mark}{name}", f"{took:.2f}", f"{took / total:.0%}")
        Console(width=110).print(table)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        sys.exit(work(sys.argv[2:]))
    main(sys.argv[1:])
