"""Who holds how much memory: a run's parts, this process, the machine."""

from __future__ import annotations

import os
import re
import resource
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

    from cl_moe.models.base import ContinualModel
    from cl_moe.strategies.base import Strategy

_CUDA = re.compile(r"total capacity of ([\d.]+ \w+) of which ([\d.]+ \w+) is free")
_MODEL = ("layer.", "model.", "growth.")


class Holding(NamedTuple):
    """What a part of a run holds: in words, in bytes, and the keys that decide it."""

    words: str
    size: int
    keys: tuple[str, ...]


def holdings(
    model: ContinualModel,
    strategies: Mapping[str, Strategy],
    optimizers: Iterable[torch.optim.Optimizer] = (),
) -> Iterator[Holding]:
    """Weights (and the expert layers' share), gradients, optimizer state, what each strategy keeps; bytes."""
    weights = _size(model.parameters())
    experts = _size(p for layer in model.expert_layers.values() for p in layer.parameters())
    share = f" ({100 * experts / weights:.0f}% in expert layers)" if experts else ""
    state = [value for optimizer in optimizers for of in optimizer.state.values() for value in of.values()]
    gradients = _size(p.grad for p in model.parameters() if p.grad is not None)
    yield Holding(f"weights{share}", weights, _MODEL)
    yield Holding("gradients", gradients, _MODEL)
    yield Holding(
        "optimizer state", _size(value for value in state if hasattr(value, "element_size")), _MODEL
    )
    for name, strategy in strategies.items():
        yield Holding(f"strategy {name}", strategy.buffer_bytes, (f"strategy.{name}.",))


def machine(refusal: str = "") -> str:
    """Free and total memory, of the GPU where the refusal came from one; and this process's peak."""
    if match := _CUDA.search(refusal):
        torch = sys.modules["torch"]
        peak = readable(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else "an unknown part"
        return f"the GPU had {match[2]} of {match[1]} free; this process held at most {peak} of it"
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    unit = 1 if sys.platform == "darwin" else 1024
    peak = readable(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    bound = "" if limit == resource.RLIM_INFINITY else f", with a limit of {readable(limit)} (ulimit -v)"
    return f"the machine has {_free()} of {readable(total)} free; this process held at most {peak}{bound}"


def readable(size: int) -> str:
    """Bytes in the unit that suits them.

    >>> readable(512), readable(1536), readable(256 * 10**9)
    ('512 bytes', '1.5 KiB', '238.4 GiB')
    """
    amount, units = float(size), ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"]
    if size < 1024:
        return f"{size} bytes"
    while amount >= 1024 and units:
        amount, unit = amount / 1024, units.pop(0)
    return f"{amount:.1f} {unit}"


def _size(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _free() -> str:
    """What a process could still get, where the system says so."""
    try:
        match = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        match = None
    return readable(int(match[1]) * 1024) if match else "an unknown part"
