"""A mixture of experts beside a dense layer of equal active operations, and frozen cohorts beside live ones.

Top-2, dropless, width 256, experts of hidden width 512, 4,096 tokens in 8 sequences: two experts compute a
token, so the dense layer has hidden width 1,024. Beside it stand the same mixture (the same router, with its
losses) as a loop over experts, and ``mixture-of-experts`` 0.2.3 (extra ``bench``), which drops what exceeds
its capacity: twice the even share here, the least with which all choices of every token could be computed.

The second table holds steps (forward, backward, AdamW) of one layer of ten cohorts of eight experts each:
all live, or all but the youngest frozen; with something that learns below, which needs the gradient of the
layer's input, and without.

The process keeps freed memory, as a run of the platform does, for all contenders alike.

Repetitions are interleaved, so that a change of the machine's speed meets all contenders; a ratio is the
median of the repetitions' ratios. The exit status is 1 if one is over its limit.

    python benchmarks/moe_step.py [--repetitions 15] [--device cuda --dtype bfloat16]
    python benchmarks/moe_step.py --threads 1 --clock cpu    # where other work runs beside it
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from cl_moe.layers import DenseFFN, MoE, TopK
from cl_moe.layers.routers import Candidates
from cl_moe.layers.tokens import flat_tokens
from cl_moe.memory import keep_freed
from cl_moe.optim import AdamW

try:
    from mixture_of_experts import MoE as PublicMoE
except ImportError:  # the extra is not installed
    PublicMoE = None

WIDTH, HIDDEN, CHOICES, SEQUENCES, LENGTH = 256, 512, 2, 8, 512
SIZES, LIMITS = (8, 64), {8: 1.4, 64: 1.8}
COHORTS, NEWBORNS = 10, 8
FROZEN_LIMITS = {"something learns below": 0.75, "nothing learns below": 0.55}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
Step = Callable[[], float]


class Setting(NamedTuple):
    """What all contenders share.

    Args:
        tokens: (sequences, length, width), float32.
        dtype: of matrix products: float32, or bfloat16 by autocast.
        repetitions: of every step.
        seconds: of the wall, or of the processor.
    """

    tokens: Tensor
    dtype: torch.dtype
    repetitions: int
    seconds: Callable[[], float]

    def clock(self) -> float:
        """Seconds, when all that was asked of the device is done."""
        if self.tokens.is_cuda:
            torch.cuda.synchronize(self.tokens.device)
        return self.seconds()

    def autocast(self) -> torch.autocast:
        """Where forward passes run."""
        return torch.autocast(self.tokens.device.type, self.dtype, enabled=self.dtype != torch.float32)


class LoopedMoE(nn.Module):
    """The same mixture, its router and losses included, one expert after the other."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.router, self.key = TopK(WIDTH, CHOICES), nn.Parameter(torch.empty(num_experts, WIDTH))
        self.router.init_keys(self.key)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, WIDTH))
            for _ in range(num_experts)
        )
        every = torch.arange(num_experts)
        self.register_buffer("every", every)
        self.register_buffer("live", torch.ones_like(every, dtype=torch.bool))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The output, and the router's losses."""
        tokens = flat_tokens(x, None)
        routing = self.router(tokens, Candidates([self.key], self.every, self.live, len(self.experts)))
        out_TD = torch.zeros_like(tokens.x)
        for index, expert in enumerate(self.experts):
            token, place = (routing.expert == index).nonzero(as_tuple=True)
            rows = expert(tokens.x[token]) * routing.weight[token, place].unsqueeze(-1)
            out_TD.index_add_(0, token, rows.to(x))
        return out_TD.reshape(x.shape), sum(routing.losses.values(), out_TD.new_zeros(()))


class Ours(nn.Module):
    """One of our layers, which adds up its losses."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The output, and the router's losses."""
        out, routing = self.layer(x)
        return out, sum(routing.losses.values(), out.new_zeros(()))


def contenders(num_experts: int) -> dict[str, nn.Module]:
    """The layers that are compared, the dense one first."""
    layers = {
        "dense": Ours(DenseFFN(WIDTH, CHOICES * HIDDEN)),
        "cl-moe": Ours(MoE(WIDTH, num_experts, HIDDEN, TopK(WIDTH, CHOICES))),
        "loop over experts": LoopedMoE(num_experts),
    }
    if PublicMoE is not None:
        layers["mixture-of-experts"] = PublicMoE(
            WIDTH, num_experts, HIDDEN, second_policy_train="all", capacity_factor_train=2.0
        )
    return layers


def passes(layer: nn.Module, x: Tensor, setting: Setting) -> Step:
    """Seconds of a forward and a backward pass, gradients made anew."""

    def step() -> float:
        layer.zero_grad(set_to_none=True)
        x.grad = None
        start = setting.clock()
        with setting.autocast():
            out, loss = layer(x)
        (out.float().square().mean() + loss).backward()
        return setting.clock() - start

    return step


def updates(optimizer: torch.optim.Optimizer, setting: Setting) -> Step:
    """Seconds of an optimizer step, with the gradients that are there."""

    def step() -> float:
        start = setting.clock()
        optimizer.step()
        return setting.clock() - start

    return step


def adamw(layer: nn.Module) -> torch.optim.Optimizer:
    """What ``optimizer=adamw`` makes, over what learns."""
    return AdamW(lr=1e-4).build(layer.named_parameters())


def interleaved(steps: Mapping[str, list[Step]], repetitions: int) -> dict[str, list[list[float]]]:
    """Seconds per contender, part of its step and repetition; two rounds warm up."""
    times: dict[str, list[list[float]]] = {name: [[] for _ in parts] for name, parts in steps.items()}
    for repetition in range(repetitions + 2):
        for name, parts in steps.items():
            seconds = [part() for part in parts]
            for kept, took in zip(times[name], seconds, strict=True):
                if repetition > 1:
                    kept.append(took)
    return times


def ratio(ours: list[float], theirs: list[float]) -> float:
    """Median of the repetitions' ratios."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def coloured(text: str, bad: bool) -> str:
    return f"[{'red' if bad else 'green'}]{text}"


def beside_dense(setting: Setting, console: Console) -> bool:
    """The first table; whether all ratios are within their limits."""
    table = Table(
        title=f"forward + backward, {torch.get_num_threads()} threads, {setting.repetitions} repetitions: ms"
    )
    for column in ("experts", "", "median", "min", "max", "x dense", "at most", "optimizer", "cl-moe / it"):
        table.add_column(column, justify="left" if not column else "right")
    fine = True
    for size in SIZES:
        layers = {name: layer.to(setting.tokens) for name, layer in contenders(size).items()}
        steps = {
            name: [passes(layer, setting.tokens, setting), updates(adamw(layer), setting)]
            for name, layer in layers.items()
        }
        times = interleaved(steps, setting.repetitions)
        for name, (took, optimizing) in times.items():
            of_dense, of_ours = ratio(took, times["dense"][0]), ratio(times["cl-moe"][0], took)
            limit = LIMITS[size] if name == "cl-moe" else None
            beaten = name not in ("dense", "cl-moe")
            fine &= (limit is None or of_dense <= limit) and not (beaten and of_ours >= 1)
            table.add_row(
                str(size),
                name,
                *(f"{1000 * value:.1f}" for value in (statistics.median(took), min(took), max(took))),
                coloured(f"{of_dense:.2f}", of_dense > limit) if limit else f"{of_dense:.2f}",
                "" if limit is None else str(limit),
                f"{1000 * statistics.median(optimizing):.1f}",
                coloured(f"{of_ours:.2f}", of_ours >= 1) if beaten else "",
                end_section=name == list(layers)[-1],
            )
    console.print(table)
    if PublicMoE is None:
        console.print("mixture-of-experts is not installed: pip install -e '.[bench]'")
    return fine


def cohorts_of(num_frozen: int, tokens: Tensor) -> MoE:
    """A layer of ten cohorts, the oldest of which are frozen."""
    layer = MoE(WIDTH, NEWBORNS, HIDDEN, TopK(WIDTH, CHOICES))
    for _ in range(COHORTS - 1):
        layer.grow(NEWBORNS)
    layer.freeze(range(num_frozen))
    return layer.to(tokens)


def whole_step(layer: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, setting: Setting) -> Step:
    """Seconds of both passes and the optimizer."""
    parts = passes(layer, x, setting), updates(optimizer, setting)
    return lambda: sum(part() for part in parts)


def frozen_beside_live(setting: Setting, console: Console) -> bool:
    """The second table; whether all ratios are within their limits."""
    title = (
        f"{COHORTS} cohorts of {NEWBORNS} experts: ms per step with AdamW, {setting.repetitions} repetitions"
    )
    table = Table(title=title)
    for column in ("", "all live", "9 frozen", "ratio", "at most", "optimizer state"):
        table.add_column(column, justify="left" if not column else "right")
    fine = True
    for name, limit in FROZEN_LIMITS.items():
        x = setting.tokens.detach().requires_grad_(name == "something learns below")
        layers = {kind: Ours(cohorts_of(num, x)) for kind, num in (("live", 0), ("frozen", COHORTS - 1))}
        optimizers = {kind: adamw(layer) for kind, layer in layers.items()}
        steps = {kind: [whole_step(layers[kind], optimizers[kind], x, setting)] for kind in layers}
        times = {kind: took for kind, (took,) in interleaved(steps, setting.repetitions).items()}
        kept = {kind: state_bytes(optimizer) for kind, optimizer in optimizers.items()}
        share = ratio(times["frozen"], times["live"])
        fine &= share <= limit and COHORTS * kept["frozen"] == kept["live"]
        table.add_row(
            name,
            *(f"{1000 * statistics.median(times[kind]):.1f}" for kind in ("live", "frozen")),
            coloured(f"{share:.2f}", share > limit),
            str(limit),
            f"{kept['frozen'] / 2**20:.1f} of {kept['live'] / 2**20:.1f} MiB",
        )
    console.print(table)
    return fine


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of an optimizer's moments; its counters of steps aside."""
    entries = (entry for state in optimizer.state.values() for entry in state.values())
    return sum(entry.numel() * entry.element_size() for entry in entries if entry.dim() > 0)


def main(*words: str) -> int:
    """Print both tables. Returns 1 if a ratio is over its limit, else 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    options = parser.parse_args(words)
    torch.set_num_threads(options.threads)
    keep_freed()
    torch.manual_seed(0)
    tokens = torch.randn(SEQUENCES, LENGTH, WIDTH, device=options.device, requires_grad=True)
    setting = Setting(tokens, getattr(torch, options.dtype), options.repetitions, CLOCKS[options.clock])
    console = Console(width=110)
    parts = [table(setting, console) for table in (beside_dense, frozen_beside_live)]
    return 0 if all(parts) else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
