"""What cohorts of a product-key expert layer cost: frozen ones in a step, a newborn one at its birth.

PEER as in ``peer_step.py``. First, ten cohorts of one size, all live or nine of them frozen, above a layer
that learns; a step is forward, backward and optimizer. Then a pool that grows by a tenth: seconds, and memory
beside what the old pool holds. Each number comes from a process of its own; contenders are interleaved.

    python benchmarks/peer_cohorts.py [--sizes 128 512 1024] [--repetitions 5] [--steps 5] [--grown 1024]
        [--threads 2] [--clock wall|cpu]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from cl_moe.layers import PEER
from cl_moe.memory import PeakMemory, keep_freed, optimizer_bytes, readable, storage_bytes
from cl_moe.optim import AdamW

DIM, HEADS, K, TOKENS, COHORTS = 256, 8, 16, 1024, 10
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
STEP_LIMIT, GROWTH_LIMIT = 0.6, 2.0


def tenth(size: int) -> int:
    """The side of the grid that is nearest to a tenth of size x size experts."""
    return round(size / COHORTS**0.5)


def step(frozen: int, asked: argparse.Namespace) -> dict[str, Any]:
    """Seconds of steps with so many frozen cohorts of ten; bytes of the optimizer's state."""
    clock, size = CLOCKS[asked.clock], tenth(asked.sizes[0])
    below, layer = nn.Linear(DIM, DIM), PEER(DIM, size * size, heads=HEADS, k=K)
    for _ in range(COHORTS - 1):
        layer.grow(size * size)
    layer.freeze(range(frozen))
    model = nn.ModuleList([below, layer])
    optimizer, seconds = AdamW(lr=1e-3).build(model.named_parameters()), []
    for _ in range(asked.steps + 1):
        x = torch.randn(1, TOKENS, DIM)
        start = clock()
        (layer(below(x))[0] - x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(clock() - start)
    live = sum(p.numel() * p.element_size() for p in layer.parameters() if p.requires_grad)
    return {"seconds": seconds[1:], "state": optimizer_bytes([optimizer]), "live": live}


def growth(asked: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a growth by a tenth, and the bytes that it held beside the old pool."""
    clock, layer = CLOCKS[asked.clock], PEER(DIM, asked.grown**2, heads=HEADS, k=K)
    peak = PeakMemory()
    peak.start()
    start = clock()
    layer.grow(tenth(asked.grown) ** 2)
    seconds = clock() - start
    born = storage_bytes(layer.cohorts[1].parameters())
    return {"seconds": [seconds], "peak": peak.bytes(), "born": born}


def measure(work: str, size: int, asked: argparse.Namespace) -> dict[str, Any]:
    """One of the two in a process of its own."""
    command = [sys.executable, __file__, "--work", work, "--sizes", str(size), "--steps", str(asked.steps)]
    command += ["--threads", str(asked.threads), "--clock", asked.clock, "--grown", str(asked.grown)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def steps(size: int, asked: argparse.Namespace) -> bool:
    """Print live against frozen; whether the limit holds."""
    found: dict[str, list[dict[str, Any]]] = {"ten live": [], "nine frozen, one live": []}
    for _ in range(asked.repetitions):
        for name, frozen in zip(found, (0, COHORTS - 1), strict=True):
            found[name].append(measure(f"step {frozen}", size, asked))
    medians = {n: statistics.median(s for run in runs for s in run["seconds"]) for n, runs in found.items()}
    table = Table(title=f"PEER, ten cohorts of {tenth(size)} x {tenth(size)} experts (about {size} x {size})")
    for column in ("", "a step, s", "least", "of all live", "optimizer's state", "learning weights"):
        table.add_column(column, justify="right" if column else "left")
    for name, runs in found.items():
        ratio = medians[name] / medians["ten live"]
        held = [readable(runs[0][key]) for key in ("state", "live")]
        least = min(s for run in runs for s in run["seconds"])
        table.add_row(name, f"{medians[name]:.3f}", f"{least:.3f}", f"{ratio:.2f}", *held)
    Console(width=110).print(table)
    holds = size < 512 or medians["nine frozen, one live"] / medians["ten live"] <= STEP_LIMIT
    if size >= 512:
        Console().print(f"[{'green' if holds else 'red'}]at most {STEP_LIMIT} of all live")
    return holds


def births(asked: argparse.Namespace) -> bool:
    """Print what a growth takes; whether the limits hold."""
    runs = [measure("growth", asked.grown, asked) for _ in range(asked.repetitions)]
    seconds = statistics.median(run["seconds"][0] for run in runs)
    peak, born = max(run["peak"] for run in runs), runs[0]["born"]
    holds = seconds < GROWTH_LIMIT and peak < 2 * born
    Console().print(
        f"[{'green' if holds else 'red'}]{asked.grown} x {asked.grown} experts grow by "
        f"{tenth(asked.grown)} x {tenth(asked.grown)}: {seconds:.2f} s (under {GROWTH_LIMIT}), "
        f"{readable(peak)} beside the old pool, {readable(born)} of it the newborns (at most twice that)"
    )
    return holds


def main() -> int:
    """Measure and print; 1 if a limit does not hold."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 512, 1024])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--grown", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.work:
        torch.set_num_threads(asked.threads)
        keep_freed()
        torch.manual_seed(0)
        kind, _, frozen = asked.work.partition(" ")
        print(json.dumps(step(int(frozen), asked) if kind == "step" else growth(asked)))
        return 0
    good = [steps(size, asked) for size in asked.sizes] + [births(asked)]
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
