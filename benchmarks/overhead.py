"""CPU time of one arm of the demo that logging, diagnostics and counting take.

The same run four times: bare (no tracking, no diagnostics, nothing counted, and no table, figure or model
left behind), with its operations counted, as it is by default, and with everything switched on. The matrix's
evaluations and the checkpoints are in all four; the overhead is what a run takes longer than the bare one, as
a share of the bare one's time, and as one of its time without those evaluations. A short run of each kind
comes first, since the first one in a process loads libraries and makes the store; the demo's seven arms share
one process, too. Repetitions are interleaved, in an order that turns round from one to the next, so that a
change of the machine's speed meets all four; the overhead is the median of the repetitions' overheads (a
single one may be off by a twentieth: so much do equal trainings differ). All times are CPU seconds, those of
threads that watch the machine and of processes that were started (git) included. The exit status is 1 if the
default's overhead is over its limit.

    python benchmarks/overhead.py [repetitions] [overrides ...]
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from omegaconf import open_dict
from rich.console import Console
from rich.table import Table

from cl_moe import launch, leaving
from cl_moe.counting import charges
from cl_moe.experiment import run_experiment
from cl_moe.run import Run

ARM = ("experiment=demo_lwf", "trainer.accelerator=cpu")
BARE = ("tracking=none", "eval.decomposition=never", "eval.samples=0")
SHORT = ("stream.train_bytes=4096", "stream.test_bytes=1024")
ALL = ("eval.decomposition=always", "eval.samples=1000000", "trainer.log_every=1", "eval.every=10")
ALL += ("tracking.system_metrics=true",)
LIMITS = {"counting operations": 0.02, "default": 0.10}


@contextmanager
def uncounted() -> Iterator[SimpleNamespace]:
    """In place of ``CountFlops``."""
    yield SimpleNamespace(total=0)


def build(overrides: Sequence[str]) -> Run:
    """A run as the command line would build it."""
    with initialize_config_module("conf", version_base="1.3"):
        config = compose("config", list(overrides), return_hydra_config=True)
        HydraConfig.instance().set_config(config)
        with open_dict(config):
            del config["hydra"]
        return launch.build(config)


def cpu_seconds() -> float:
    """Of this process and of those that it started and that have ended."""
    return sum(os.times()[:4])


def timed(folder: Path, overrides: Sequence[str], counts: bool, leaves: bool) -> tuple[float, float]:
    """CPU seconds of a whole run, and of the matrix's evaluations in it.

    Args:
        folder: of the store.
        overrides: of the run.
        counts: whether operations are counted.
        leaves: whether it leaves artifacts behind.
    """
    with tempfile.TemporaryDirectory(dir=folder) as output:
        store = [f"tracking.uri=sqlite:///{folder / 'mlflow.db'}"] if "tracking=none" not in overrides else []
        run = build([*overrides, *store, f"output_dir={output}"])
        # The accounts' clock, too, is that of the processor: wall seconds say what else the machine did.
        clock = mock.patch.object(charges, "time", SimpleNamespace(perf_counter=time.process_time))
        start = cpu_seconds()
        with ExitStack() as stack:
            stack.enter_context(clock)
            if not counts:
                stack.enter_context(mock.patch.object(charges, "CountFlops", uncounted))
            for name in () if leaves else ("write_start", "tell_start", "left_by"):
                stack.enter_context(mock.patch.object(leaving, name, return_value=()))
            run_experiment(run)
            return cpu_seconds() - start, run.cost.points()["cost/eval_seconds"]


def main(repetitions: int = 5, *overrides: str) -> int:
    """Print the table; an overhead over its limit is red. Returns 1 if the default's is, else 0."""
    contenders = {
        "bare": ((*ARM, *BARE, *overrides), False, False),
        "counting operations": ((*ARM, *BARE, *overrides), True, False),
        "default": ((*ARM, *overrides), True, True),
        "everything": ((*ARM, *ALL, *overrides), True, True),
    }
    times: dict[str, list[float]] = {name: [] for name in contenders}
    shares: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    with tempfile.TemporaryDirectory() as folder:
        for words, *how in contenders.values():
            timed(Path(folder), (*words, *SHORT), *how)
        for repetition in range(repetitions):
            turn = list(contenders)[:: -1 if repetition % 2 else 1]
            seconds = {name: timed(Path(folder), *contenders[name]) for name in turn}
            bare, evaluating = seconds["bare"]
            for name, (took, _) in seconds.items():
                times[name].append(took)
                shares[name].append(((took - bare) / bare, (took - bare) / (bare - evaluating)))
    table = Table(title=f"{ARM[0]}: CPU seconds of a run, {repetitions} repetitions")
    for column in ("", "median", "min", "max", "overhead", "at most", "without evaluations"):
        table.add_column(column, justify="left" if not column else "right")
    overhead = {
        name: [statistics.median(kind) for kind in zip(*both, strict=True)] for name, both in shares.items()
    }
    for name, took in times.items():
        (share, of_training), limit = overhead[name], LIMITS.get(name)
        colour = "" if limit is None else "[red]" if share > limit else "[green]"
        numbers = (f"{value:.2f}" for value in (statistics.median(took), min(took), max(took)))
        bound = "" if limit is None else f"{limit:.0%}"
        table.add_row(name, *numbers, f"{colour}{share:+.1%}", bound, f"{of_training:+.1%}")
    Console().print(table)
    return int(overhead["default"][0] > LIMITS["default"])


if __name__ == "__main__":
    sys.exit(main(*(int(word) for word in sys.argv[1:2]), *sys.argv[2:]))
