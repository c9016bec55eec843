"""Not a test by itself: one run killed at random moments and resumed each time, held against one left alone.

``make chaos SEED=1`` plays it with 20 kills, ``test_chaos.py`` with three; ``test_resume.py`` borrows parts.
The run has six experiences, growth, freezing, replay and distillation. Half of the signals are SIGKILL, half
SIGTERM; they come at random times, so they meet whatever the program is doing: composing its configuration,
opening the store, training, saving, evaluating, sending, drawing.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

RUN = (
    *("hydra.run.dir=out", "stream=permuted_digits", "stream.num_experiences=6", "trainer.batch_size=64"),
    *("layer=moe", "layer.hidden=16", "layer.num_experts=4", "growth=every_experience"),
    *("growth.num_experts=4", "freeze=past_experts", "strategy=[replay,lwf]", "trainer.log_every=4"),
    *("strategy.replay.memory_size=100", "optimizer=adamw", "optimizer.state=carry"),
    *("trainer.epochs=3", "checkpoint.every_steps=5"),
)
DRIVER = Path(__file__).with_name("killed.py")
WALL_CLOCK = {f"cost/{name}seconds" for name in ("", "eval_", "diagnostics_")}
WALL_CLOCK |= {"cost/tokens_per_second", "cost/peak_memory_bytes"}
STARTING = 1.0  # seconds, about, from a process' start to its first work
AFTERWARDS = 0.3  # seconds, enough to reach what comes between two checkpoints
PATIENCE = 300  # seconds that a process may take on a machine with other work


def forkserver() -> ForkServerContext:
    """Forks runs from a process that has imported everything once, which takes seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cl_moe.launch", "cl_moe.experiment", "mlflow", "datasets", "sklearn"])
    first = context.Process(target=time.monotonic)  # waits for the imports, so that nobody measures them
    first.start()
    first.join()
    return context


def start(
    context: ForkServerContext,
    folder: Path,
    words: Sequence[str],
    place: str = "never",
    count: int = 0,
    number: int = signal.SIGKILL,
) -> BaseProcess:
    """cl-moe in a process of its own, working in ``folder``; ``killed.py`` says what the rest is."""
    given = {
        "FOLDER": str(folder),
        "ARGUMENTS": list(words),
        "PLACE": place,
        "COUNT": count,
        "SIGNAL": number,
    }
    process = context.Process(target=runpy.run_path, args=(str(DRIVER), given))
    process.start()
    return process


def through(context: ForkServerContext, folder: Path) -> None:
    """Run to the end."""
    process = start(context, folder, words(folder))
    process.join(PATIENCE)
    if process.exitcode != 0:
        raise AssertionError(f"exit status {process.exitcode}\n{(folder / 'log.txt').read_text()}")


def wait_until_behind(process: BaseProcess, folder: Path, share: float, steps: Sequence[int]) -> None:
    """Until it has kept at least this share of the run's steps, or has ended."""
    end = time.monotonic() + PATIENCE
    while process.exitcode is None and done(folder, steps) < share and time.monotonic() < end:
        process.join(0.01)


def hit(
    context: ForkServerContext,
    folder: Path,
    share: float | None,
    wait: float,
    number: signal.Signals,
    steps: Sequence[int],
) -> str:
    """Start or resume, send a signal ``wait`` seconds later; says how it ended.

    Args:
        context: of the processes.
        folder: of the run.
        share: of the run's steps that are kept before the wait begins; None: it begins with the process.
        wait: in seconds.
        number: the signal.
        steps: those before each boundary.
    """
    process = start(context, folder, words(folder))
    if share is not None:
        wait_until_behind(process, folder, share, steps)
    process.join(wait)
    if process.exitcode is None:
        assert process.pid is not None
        os.kill(process.pid, number)
    process.join(PATIENCE)
    if process.exitcode not in (0, 75, -number):
        raise AssertionError(f"exit status {process.exitcode}\n{(folder / 'log.txt').read_text()}")
    when = "its start" if share is None else f"{share:.0%}"
    return f"{number.name} {wait:.2f} s after {when}: status {process.exitcode}, {newest(folder)} kept"


def words(folder: Path) -> Sequence[str]:
    """What starts the run, or lets it go on."""
    return ("resume=out",) if (folder / "out/command.yaml").exists() else RUN


def newest(folder: Path) -> str:
    """The newest checkpoint's moment."""
    names = sorted(path.name.split("-")[0] for path in folder.glob("out/checkpoints/boundary_*.pt"))
    return names[-1] if names else "nothing"


def done(folder: Path, steps: Sequence[int]) -> float:
    """The share of a run's steps behind its newest checkpoint; ``steps``: those before each boundary."""
    name = newest(folder)
    if name == "nothing":
        return 0.0
    _, boundary, *inside = name.split("_")
    return (steps[int(boundary)] + (int(inside[-1]) if inside else 0)) / steps[-1]


def facts(folder: Path) -> dict[str, object]:
    """All that must not depend on how often a run was stopped."""
    from cl_moe import checkpoint
    from cl_moe.tracking import artifacts

    state = checkpoint.newest(folder / "out/checkpoints")
    assert state is not None
    state["cost"].pop("clock")
    state["tracker"] = None  # timestamps
    files = {name: (folder / "out" / name).read_bytes() for name in (artifacts.MATRIX, artifacts.LEDGER)}
    return {"files": files, "state": state, "points": points(folder)}


def points(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every point of the one run that there is, as often as it stands in the store."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    (run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    if (run.info.status, run.data.tags["status"]) != ("FINISHED", "finished"):
        raise AssertionError(f"the run in MLflow is {run.info.status}, {run.data.tags['status']}")
    history = {key: client.get_metric_history(run.info.run_id, key) for key in run.data.metrics}
    return {
        key: sorted((m.step, 0.0 if key in WALL_CLOCK else m.value) for m in found)
        for key, found in history.items()
    }


def differences(one: object, two: object, place: str = "") -> list[str]:
    """Places in which two nests of plain Python and tensors are not the same, bit by bit."""
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        return [] if torch.equal(one, two) else [place]
    if isinstance(one, Mapping) and isinstance(two, Mapping):
        if one.keys() != two.keys():
            return [f"{place}: keys {sorted(map(str, one.keys() ^ two.keys()))}"]
        return [d for key in one for d in differences(one[key], two[key], f"{place}/{key}")]
    if isinstance(one, list | tuple) and isinstance(two, list | tuple) and len(one) == len(two):
        pairs = enumerate(zip(one, two, strict=True))
        return [d for index, pair in pairs for d in differences(*pair, f"{place}/{index}")]
    return [] if type(one) is type(two) and one == two else [f"{place}: {one!r:.80} and {two!r:.80}"]


def play(folder: Path, seed: int, kills: int, store: Path | None = None) -> list[str]:
    """Reference and disturbed run in two folders; returns what hit the second, and refuses a difference.

    Moments are shares of the run's steps, since a busy machine stretches seconds. A process does on average
    an even part of the work that is left, and a little more; one in five is hit while it starts.

    Args:
        folder: empty.
        seed: of moments and signals.
        kills: how many.
        store: an empty MLflow store to copy; without one each run makes its own, which takes seconds.
    """
    context, draw, said = forkserver(), random.Random(seed), []
    alone, disturbed = folder / "alone", folder / "disturbed"
    for place in (alone, disturbed):
        place.mkdir()
        if store is not None:
            shutil.copy(store, place / "mlflow.db")
    through(context, alone)
    reference: Any = facts(alone)
    steps = reference["state"]["record"]["steps"]
    for left in range(kills, 0, -1):
        share, wait = None, draw.uniform(0, STARTING)
        if draw.random() < 0.8:
            behind = done(disturbed, steps)
            share, wait = behind + draw.uniform(0, 2 * (1 - behind) / (left + 1)), draw.uniform(0, AFTERWARDS)
        number = draw.choice([signal.SIGKILL, signal.SIGTERM])
        said.append(hit(context, disturbed, share, wait, number, steps))
    through(context, disturbed)
    if found := differences(reference, facts(disturbed)):
        raise AssertionError("\n".join([*said, "differ in:", *found[:20]]))
    return said


def main(arguments: Any = None) -> None:
    """The command behind ``make chaos``."""
    parser = argparse.ArgumentParser(description="one run killed at random moments, against one left alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=20)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        try:
            for line in play(Path(folder), chosen.seed, chosen.kills):
                print(line)
        except AssertionError as error:
            sys.exit(f"chaos with SEED={chosen.seed}: {error}")
    print(
        f"SEED={chosen.seed}: {chosen.kills} signals, and the same matrix, weights, ledger, points in MLflow"
    )


if __name__ == "__main__":
    main()
