"""What ranks that train one expert layer send each other, counted and by formula; what a second one brings.

A step is forward, backward and optimizer (AdamW) of one layer under DDP over gloo, on this machine's CPU. All
numbers are of one rank and one step. ``--carry`` measures nothing: it carries the formulas to 8 machines of 8
GPUs and a million experts (docs/WIRE.md).

    python benchmarks/wire.py [--ranks 2] [--tokens 1024] [--steps 5] [--experts 64] [--side 256] [--carry]

Legend: W ranks, T tokens of a rank, K choices per token, D width, b bytes of a number, N experts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor, multiprocessing, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from cl_moe.layers import PEER, MoE
from cl_moe.layers.exchange import Exchange, owned, spread
from cl_moe.layers.ranks import use_group
from cl_moe.memory import readable
from cl_moe.optim import AdamW, exchange_rows

DIM, HIDDEN, TOP, HEADS, K = 256, 512, 2, 8, 16
CASES = ("moe replicated", "moe sharded", "peer replicated", "peer by rows", "peer sharded")


def replicated(weights: float, ranks: int) -> float:
    """Bytes of a gradient of so many bytes that a rank sends, summed up in a ring (Patarasuk and Yuan 2009).

    >>> replicated(1000, 2), replicated(1000, 64)
    (1000.0, 1968.75)
    """
    return 2 * weights * (ranks - 1) / ranks


def to_owners(pairs: float, experts: int, dim: int, ranks: int, number: int = 4) -> float:
    """Bytes of tokens that go to their experts and back, and of the gradients on both ways; even choices.

    Args:
        pairs: tokens of a rank times the experts that each goes to.
        experts: N, of which each rank tells every other how many tokens come.
        dim: D.
        ranks: W.
        number: b.

    >>> to_owners(pairs=10, experts=8, dim=4, ranks=2)
    352.0
    """
    return (4 * pairs * dim * number + 8 * experts) * (ranks - 1) / ranks


def by_rows(rows: float, experts: int, tables: int, dim: int, ranks: int, number: int = 4) -> float:
    """Bytes of the rows' gradients that a rank hands to all others, where all hold the tables.

    Where that is more than the tables' own bytes, and one of each row that says whether it was touched, would
    be in a ring, those are sent.

    Args:
        rows: touched, of each table, by the rank that touches most.
        experts: N, rows of a table.
        tables: of one vector per expert.
        dim: D.
        ranks: W.
        number: b.

    >>> by_rows(rows=10, experts=1000, tables=2, dim=4, ranks=2)
    496
    """
    handed = (ranks - 1) * rows * (8 + dim * number)
    return tables * ((ranks - 1) * 8 + min(handed, replicated(experts * (dim * number + 1), ranks)))


def asked_for(rows: float, tables: int, dim: int, ranks: int, number: int = 4) -> float:
    """Bytes of the rows' ids, the rows and their gradients, where each row has one owner; even choices.

    >>> asked_for(rows=10, tables=2, dim=4, ranks=2)
    368.0
    """
    return (ranks - 1) * 8 + rows * (8 + 2 * tables * dim * number) * (ranks - 1) / ranks


def distinct(choices: float, experts: float) -> float:
    """How many experts are among so many choices, each of which may be any of them.

    >>> round(distinct(16, 1), 3), round(distinct(1000, 1000) / 1000, 2)
    (1.0, 0.63)
    """
    return experts * (1 - (1 - 1 / experts) ** choices)


class _Body(nn.Module):
    def __init__(self, layer: nn.Module, left: list[str]) -> None:
        super().__init__()
        self.layer = layer
        self._ddp_params_and_buffers_to_ignore = [f"layer.{name}" for name in left]  # torch's name for it

    def forward(self, x_TD: Tensor) -> tuple[Tensor, int]:
        out_TD, routing = self.layer(x_TD)
        touched = routing.expert.unique().numel()
        if isinstance(self.layer, MoE) and (exchange := self.layer.cohorts[0].exchange) is not None:
            own = exchange.own(self.layer.num_experts)
            touched = int(((routing.expert < own.start) | (routing.expert >= own.stop)).sum())
        return (out_TD - x_TD).square().mean(), touched


def layer_of(case: str, asked: argparse.Namespace) -> nn.Module:
    """The layer of a case, the same on every rank."""
    torch.manual_seed(0)
    if case.startswith("moe"):
        return MoE(DIM, asked.experts, hidden=HIDDEN)
    return PEER(DIM, asked.side**2, heads=HEADS, k=K)


def work(rank: int, ranks: int, case: str, asked: argparse.Namespace, folder: str) -> None:
    """One rank: what it sent for experts and DDP for the rest, seconds, and rows or pairs, of every step."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", rank=rank, world_size=ranks, store=store)
    use_group(dist.new_group())
    layer, counted = layer_of(case, asked), {"ddp": 0, "rows": 0}
    names = [f"cohorts.{i}.{n}" for i, c in enumerate(layer.cohorts) for n in owned(c)]
    exchange = Exchange(dist.new_group())
    if case.endswith("sharded"):
        spread(layer, exchange)
    whole = case.endswith("replicated")
    body = _Body(layer, [] if whole else names)
    model: nn.Module = body
    if ranks > 1:
        model = DistributedDataParallel(body)
        model.register_comm_hook(counted, _counting)
    experts = sum(p.nbytes for n, p in layer.named_parameters() if n in names) if whole else 0
    optimizer = AdamW(lr=1e-3, rows="row" if case == "peer by rows" else "dense").build(
        body.named_parameters()
    )
    draw, seconds, touched = torch.Generator().manual_seed(rank), list[float](), list[int]()
    for _ in range(asked.steps + 1):
        x_TD = torch.randn(asked.tokens * asked.ranks // ranks, DIM, generator=draw)
        x_TD.requires_grad_()  # as where something below learns: else no gradient of a token goes back
        start = time.perf_counter()
        loss, number = model(x_TD)
        loss.backward()
        if case == "peer by rows":
            counted["rows"] += exchange_rows([p for n, p in layer.named_parameters() if n in names])
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
        touched.append(number)
    ddp = counted["ddp"] / (asked.steps + 1)
    own = replicated(experts, ranks) if ranks > 1 else 0.0
    sent = own + (exchange.sent + counted["rows"]) / (asked.steps + 1)
    left = {"sent": sent, "rest": ddp - own, "seconds": seconds[1:], "touched": touched}
    Path(folder, f"left_{rank}.json").write_text(json.dumps(left))
    dist.destroy_process_group()


def _counting(counted, bucket):  # torch looks at annotations, and does not know them as text
    counted["ddp"] += round(replicated(bucket.buffer().nbytes, dist.get_world_size()))
    return allreduce_hook(None, bucket)


def measure(ranks: int, case: str, asked: argparse.Namespace) -> list[dict[str, Any]]:
    """What each of so many ranks left, each a process of its own; one rank has the tokens of all."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(work, args=(ranks, case, asked, folder), nprocs=ranks)
        return [json.loads(Path(folder, f"left_{rank}.json").read_text()) for rank in range(ranks)]


def formula(case: str, found: list[dict[str, Any]], asked: argparse.Namespace) -> float:
    """Bytes by formula, from the numbers of tokens, of experts, and of the rows that were in fact touched."""
    ranks = len(found)
    tables = 2 * asked.side**2 * DIM * 4
    if case == "moe sharded":  # from the pairs that went to others; were choices even, (W - 1) / W of all
        away = statistics.mean(n for one in found for n in one["touched"])
        return to_owners(away * ranks / (ranks - 1), asked.experts, DIM, ranks)
    if case == "moe replicated":
        return replicated(asked.experts * (2 * DIM * HIDDEN + HIDDEN + DIM) * 4, ranks)
    if case == "peer replicated":
        return replicated(tables, ranks)
    most = statistics.mean(max(numbers) for numbers in zip(*(one["touched"] for one in found), strict=True))
    if case == "peer by rows":
        return by_rows(most, asked.side**2, 2, DIM, ranks)
    return asked_for(statistics.mean(n for one in found for n in one["touched"]), 2, DIM, ranks)


def compare(asked: argparse.Namespace) -> bool:
    """Print bytes and efficiency; whether the formulas hold within a twentieth."""
    layers = f"MoE {asked.experts} x {HIDDEN}, top {TOP}; PEER {asked.side} x {asked.side}, {HEADS} x {K}"
    table = Table(title=f"{layers}; D = {DIM}, {asked.ranks} ranks, {asked.tokens} tokens each")
    for column in ("", "sent for experts", "formula", "ratio", "for the rest", "s of a step", "efficiency"):
        table.add_column(column, justify="right" if column else "left")
    alone: dict[str, float] = {}
    good = True
    for case in CASES:
        found = measure(asked.ranks, case, asked)
        rows = "by rows" if case.endswith("by rows") else "replicated"
        if (key := f"{case.split()[0]} {rows}") not in alone:
            alone[key] = statistics.median(measure(1, key, asked)[0]["seconds"])
        sent, expected = statistics.mean(one["sent"] for one in found), formula(case, found, asked)
        seconds = statistics.median(s for one in found for s in one["seconds"])
        good &= abs(sent / expected - 1) < 0.05
        numbers = f"{sent / expected:.3f}", readable(round(found[0]["rest"])), f"{seconds:.3f}"
        efficiency = f"{alone[key] / (asked.ranks * seconds):.2f}"
        table.add_row(case, readable(round(sent)), readable(round(expected)), *numbers, efficiency)
    Console(width=130).print(table)
    return good


def carry() -> None:
    """Print the formulas at 8 machines of 8 GPUs: bfloat16, D = 1,024, 8,192 tokens of a rank, one layer."""
    ranks, tokens, dim, number = 64, 8192, 1024, 2
    table = Table(
        title="one layer, one step, one of 8 x 8 GPUs: bytes sent, of which 56/63 leave the machine"
    )
    for column in (
        "experts",
        "MoE replicated",
        "MoE sharded",
        "PEER replicated",
        "PEER by rows",
        "PEER sharded",
    ):
        table.add_column(column, justify="right")
    for experts in (64, 1024, 2**14, 2**20):
        hidden = max(1, 4096 * 64 // experts)  # the same weights in all of them, from 64 experts of 4,096 on
        rows = distinct(tokens * HEADS * K, experts)
        sizes = (
            replicated(experts * 2 * dim * hidden * number, ranks),
            to_owners(tokens * TOP, experts, dim, ranks, number),
            replicated(2 * experts * dim * number, ranks),
            by_rows(rows, experts, 2, dim, ranks, number),
            asked_for(rows, 2, dim, ranks, number),
        )
        table.add_row(f"{experts:,}", *(readable(round(size)) for size in sizes))
    Console(width=130).print(table)


def main() -> int:
    """Measure and print; 1 if a formula does not hold."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("ranks", 2), ("tokens", 1024), ("steps", 5), ("experts", 64), ("side", 256)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--carry", action="store_true")
    asked = parser.parse_args()
    if asked.carry:
        carry()
        return 0
    return 0 if compare(asked) else 1


if __name__ == "__main__":
    sys.exit(main())
