"""One training step of a product-key expert layer beside its public counterpart, with time and memory.

PEER, d = 256, 8 heads that retrieve 16 experts each, 1,024 new random tokens in every step, float32, two
threads: forward, backward, optimizer. ``PEER-pytorch`` 0.2.2 retrieves one expert per head unless its scores
compete, so they do here, as in the paper. Each repetition of a contender is a process of its own; they are
interleaved, and the table shows medians over all steps. Memory is the highest that a process held beside its
interpreter and libraries. On a machine that does other work, ``--clock cpu --threads 1`` still
compares: it shows seconds of the processor.

The floor is what has to move: the touched rows of both tables read twice (forward, backward), their gradients
written and read, and weights and both moments read and written, over the bandwidth of a large copy.

    pip install -e .[bench]
    python benchmarks/peer_step.py [--sizes 128 256 512 1024] [--repetitions 3] [--steps 5]
        [--only NAME ...] [--dim 256] [--threads 2] [--clock wall|cpu]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from cl_moe.layers import PEER
from cl_moe.memory import PeakMemory, readable
from cl_moe.optim import Adagrad, AdamW, OptimizerSpec

HEADS, K, TOKENS = 8, 16, 1024
LR = 1e-3
LIMITS = {128: 4.0, 1024: 7.0}  # how many times faster than the peer with Adam
BEST_LIMIT, MEMORY_LIMIT = 2.0, 1.2
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
Parts = dict[str, list[float]]


class Contender:
    """A layer with its optimizer.

    Args:
        layer: called with (1, T, D).
        optimizer: over its parameters.
        touched: experts that the last call retrieved, each once.
    """

    def __init__(
        self, layer: nn.Module, optimizer: torch.optim.Optimizer, touched: Callable[[], int]
    ) -> None:
        self.layer, self.optimizer, self.touched = layer, optimizer, touched

    def step(self, x: Tensor, parts: Parts, clock: Callable[[], float]) -> None:
        """One training step, its three parts timed."""
        start = clock()
        out = self.layer(x)
        loss = (out - x).square().mean()
        forward = clock()
        loss.backward()
        backward = clock()
        self.optimizer.step()
        self.optimizer.zero_grad()
        stop = clock()
        parts["forward"].append(forward - start)
        parts["backward"].append(backward - forward)
        parts["optimizer"].append(stop - backward)
        parts["step"].append(stop - start)


class Ours(nn.Module):
    """A layer's output without its routing, which is kept for a look."""

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.layer = PEER(dim, size * size, heads=HEADS, k=K)
        self.expert = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        """(1, T, D)."""
        out, routing = self.layer(x)
        self.expert = routing.expert
        return out


def ours(size: int, dim: int, spec: OptimizerSpec) -> Contender:
    """The layer of this package."""
    layer = Ours(size, dim)
    return Contender(layer, spec.build(layer.named_parameters()), lambda: int(layer.expert.unique().numel()))


def theirs(size: int, dim: int, kind: str) -> Contender:
    """``PEER-pytorch`` with torch's optimizers; its sparse form has SparseAdam for the two tables."""
    import PEER_pytorch

    layer = PEER_pytorch.PEER(
        dim, heads=HEADS, num_experts=size * size, num_experts_per_head=K, non_competing_scores=False
    )
    seen: list[Tensor] = []
    layer.weight_down_embed.register_forward_pre_hook(lambda _, inputs: seen.__setitem__(slice(None), inputs))
    optimizers: list[torch.optim.Optimizer]
    if kind == "sparse":
        tables = [layer.weight_down_embed, layer.weight_up_embed]
        for table in tables:
            table.sparse = True
        rows = [table.weight for table in tables]
        rest = [p for p in layer.parameters() if all(p is not row for row in rows)]
        optimizers = [torch.optim.SparseAdam(rows, lr=LR), torch.optim.Adam(rest, lr=LR, fused=True)]
    else:
        optimizers = [torch.optim.Adam(layer.parameters(), lr=LR, fused=True if kind == "fused" else None)]
    return Contender(layer, _Together(optimizers), lambda: int(seen[0].unique().numel()))  # type: ignore[arg-type]


class _Together:
    def __init__(self, optimizers: list[torch.optim.Optimizer]) -> None:
        self.optimizers = optimizers

    def step(self) -> None:
        for one in self.optimizers:
            one.step()

    def zero_grad(self) -> None:
        for one in self.optimizers:
            one.zero_grad()


CONTENDERS: dict[str, Callable[[int, int], Contender]] = {
    "cl-moe": lambda size, dim: ours(size, dim, AdamW(lr=LR)),
    "cl-moe, rows=dense": lambda size, dim: ours(size, dim, AdamW(lr=LR, rows="dense")),
    "cl-moe, adagrad": lambda size, dim: ours(size, dim, Adagrad(lr=LR)),
    "PEER-pytorch, Adam": lambda size, dim: theirs(size, dim, "adam"),
    "PEER-pytorch, fused Adam": lambda size, dim: theirs(size, dim, "fused"),
    "PEER-pytorch, SparseAdam": lambda size, dim: theirs(size, dim, "sparse"),
}


def bandwidth() -> float:
    """Bytes per second that a large copy reads and writes."""
    source, target = torch.ones(2**26), torch.empty(2**26)
    seconds = []
    for _ in range(7):
        start = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - start)
    return 2 * source.numel() * source.element_size() / statistics.median(seconds)


def work(asked: argparse.Namespace) -> dict[str, Any]:
    """What one process measures; the first step, which fills the optimizer's state, is not timed."""
    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    peak = PeakMemory()
    peak.start()
    contender = CONTENDERS[asked.work](asked.sizes[0], asked.dim)
    weights = sum(p.numel() * p.element_size() for p in contender.layer.parameters())
    parts: Parts = {part: [] for part in ("forward", "backward", "optimizer", "step")}
    for index in range(asked.steps + 1):
        contender.step(torch.randn(1, TOKENS, asked.dim), parts, CLOCKS[asked.clock])
        if index == 0:
            parts = {part: [] for part in parts}
    held = peak.bytes()
    touched = contender.touched()
    del contender
    return {"parts": parts, "touched": touched, "peak": held, "weights": weights, "bandwidth": bandwidth()}


def measure(name: str, size: int, asked: argparse.Namespace) -> dict[str, Any]:
    """The same in a process of its own."""
    command = [sys.executable, __file__, "--work", name, "--sizes", str(size), "--steps", str(asked.steps)]
    command += ["--threads", str(asked.threads), "--clock", asked.clock, "--dim", str(asked.dim)]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    parts = {part: round(statistics.median(times), 3) for part, times in found["parts"].items()}
    print(f"{size} x {size}, {name}: {parts}, {readable(found['peak'])}", file=sys.stderr)
    return found


def floor(touched: int, dim: int, bytes_per_second: float) -> float:
    """Seconds that the touched rows of both tables take to move: see above."""
    moves = 2 + 1 + 1 + 6
    return 2 * touched * dim * 4 * moves / bytes_per_second


def show(size: int, dim: int, found: dict[str, list[dict[str, Any]]]) -> bool:
    """Print one table; whether every limit holds."""
    medians = {
        name: {
            part: statistics.median(t for run in runs for t in run["parts"][part])
            for part in runs[0]["parts"]
        }
        for name, runs in found.items()
    }
    first = next(iter(found))
    table = Table(title=f"PEER, {size} x {size} experts: seconds of a training step, median (least)")
    for column in ("", "forward", "backward", "optimizer", "step", "least", "times cl-moe", "peak", "rows"):
        table.add_column(column, justify="right" if column else "left")
    for name, runs in found.items():
        whole = medians[name]["step"]
        table.add_row(
            name,
            *(f"{medians[name][part]:.3f}" for part in ("forward", "backward", "optimizer", "step")),
            f"{min(t for run in runs for t in run['parts']['step']):.3f}",
            f"{whole / medians[first]['step']:.2f}",
            readable(max(run["peak"] for run in runs)),
            f"{statistics.median(run['touched'] for run in runs):.0f}",
        )
    speed = statistics.median(run["bandwidth"] for runs in found.values() for run in runs)
    least = floor(found[first][0]["touched"], dim, speed)
    table.add_row(f"floor at {speed / 1e9:.1f} GB/s", "", "", "", f"{least:.3f}", "", "", "", "")
    Console(width=130).print(table)
    return _verdicts(size, found, medians)


def _verdicts(
    size: int, found: dict[str, list[dict[str, Any]]], medians: dict[str, dict[str, float]]
) -> bool:
    if "cl-moe" not in found:
        return True
    ours_s, checks = medians["cl-moe"]["step"], []
    peers = {name: parts["step"] for name, parts in medians.items() if name.startswith("PEER-pytorch")}
    if size in LIMITS and "PEER-pytorch, Adam" in peers:
        checks.append(("times faster than Adam", peers["PEER-pytorch, Adam"] / ours_s, LIMITS[size], True))
    if size == 1024 and len(peers) > 1:
        checks.append(("times faster than its best", min(peers.values()) / ours_s, BEST_LIMIT, True))
    if size == 1024:
        runs = found["cl-moe"]
        share = max(run["peak"] for run in runs) / (3 * runs[0]["weights"])
        checks.append(("peak memory over weights and moments", share, MEMORY_LIMIT, False))
    good = True
    for words, value, limit, least in checks:
        holds = value >= limit if least else value <= limit
        good &= holds
        colour = "green" if holds else "red"
        bound = "at least" if least else "at most"
        Console(width=130).print(f"[{colour}]{words}: {value:.2f} ({bound} {limit})")
    return good


def main() -> int:
    """Measure and print; 1 if a limit does not hold."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 256, 512, 1024])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--only", nargs="+", default=list(CONTENDERS))
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--work", metavar="NAME", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.work:
        print(json.dumps(work(asked)))
        return 0
    good = True
    for size in asked.sizes:
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in asked.only}
        for _ in range(asked.repetitions):
            for name in found:
                found[name].append(measure(name, size, asked))
        good &= show(size, asked.dim, found)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
