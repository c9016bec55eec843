"""Who holds how much memory: a run's parts, this process, the machine."""

from __future__ import annotations

import contextlib
import ctypes
import gc
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
_TUNED = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)


class Holding(NamedTuple):
    """What a part of a run holds: in words, in bytes, and the keys that decide it."""

    words: str
    size: int
    keys: tuple[str, ...]


class PeakMemory:
    """Bytes that a run held at most, without what its process held before it: interpreter, libraries.

    On a GPU: of the GPU's memory (torch's allocator). On Linux: of resident memory, whose highest value is
    set back as a run starts, so that runs in one process, one after the other, do not inherit it; libraries
    that are loaded while the run goes on are part of it. Elsewhere, and where the system forbids that, the
    highest that the process ever held, libraries and earlier runs included.
    """

    def __init__(self) -> None:
        self.earlier = 0  # of the same run in processes that ended
        self._base: int | None = None
        self._cuda_base: int | None = None

    def start(self, held: int = 0) -> None:
        """A run starts that holds ``held`` bytes already (its data and its model)."""
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()
            self._cuda_base = torch.cuda.memory_allocated()
        gc.collect()
        return_freed()
        try:
            Path("/proc/self/clear_refs").write_text("5")  # proc(5): sets the peak resident set size back
            self._base = max(_resident("VmRSS") - _of_files() - held, 0)
        except OSError:
            self._base = None

    def bytes(self) -> int:
        """The most so far, earlier processes of a resumed run included."""
        return max(self.earlier, self._now())

    def _now(self) -> int:
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized() and torch.cuda.max_memory_allocated():
            return int(torch.cuda.max_memory_allocated()) - (self._cuda_base or 0)
        if self._base is None:
            return _process_peak()
        # Pages of libraries count as those of now: they come as code runs first, and hardly ever go.
        return max(_resident("VmHWM") - _of_files() - self._base, 0)


def keep_freed(whole: bool = True) -> None:
    """Let a process keep what a training step frees, for the next one: a fresh page costs more than its use.

    Else C's allocator asks the system for each block of 32 MiB and more anew, and gives back what is free at
    its end. Blocks of 256 MiB and more are still asked for, and half a GiB at most is kept at the end. Linux
    (glibc) alone, from 2.35 on (before it blocks from 32 MiB on are still asked for); where its environment
    variables say something else, they hold.

    Args:
        whole: whether the model is. Who takes it to pieces does so for want of memory, and pieces come and go
            in sizes that seldom fit again: nothing is kept then.
    """
    if not whole or any(name in os.environ for name in _TUNED):
        return
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        # before 2.35 glibc refuses more than 32 MiB, and the second alone would leave the first at 128 KiB
        if library.mallopt(_MMAP_THRESHOLD, 2**28) or library.mallopt(_MMAP_THRESHOLD, 2**25):
            library.mallopt(_TRIM_THRESHOLD, 2**29)


def return_freed() -> None:
    """Give the system back what was freed (glibc).

    A run that takes it again would seem to need nothing; and what one phase of a run leaves, training or
    evaluation, is of sizes that the next one has no use for, so both would stay side by side.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def optimizer_bytes(optimizers: Iterable[torch.optim.Optimizer]) -> int:
    """Bytes of what optimizers remember: momentum, second moments."""
    state = [value for optimizer in optimizers for of in optimizer.state.values() for value in of.values()]
    return _size(value for value in state if hasattr(value, "element_size"))


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes that tensors hold together; what several of them share counts once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def holdings(
    model: ContinualModel,
    strategies: Mapping[str, Strategy],
    optimizers: Iterable[torch.optim.Optimizer] = (),
) -> Iterator[Holding]:
    """Weights (and the expert layers' share), gradients, optimizer state, what each strategy keeps; bytes."""
    weights = _size(model.parameters())
    experts = _size(p for layer in model.expert_layers.values() for p in layer.parameters())
    share = f" ({100 * experts / weights:.0f}% in expert layers)" if experts else ""
    gradients = _size(p.grad for p in model.parameters() if p.grad is not None)
    yield Holding(f"weights{share}", weights, _MODEL)
    yield Holding("gradients", gradients, _MODEL)
    yield Holding("optimizer state", optimizer_bytes(optimizers), _MODEL)
    for name, strategy in strategies.items():
        yield Holding(f"strategy {name}", strategy.buffer_bytes, (f"strategy.{name}.",))


def machine(refusal: str = "") -> str:
    """Free and total memory, of the GPU where the refusal came from one; and this process's peak."""
    if match := _CUDA.search(refusal):
        torch = sys.modules["torch"]
        peak = readable(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else "an unknown part"
        return f"the GPU had {match[2]} of {match[1]} free; this process held at most {peak} of it"
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    peak = readable(_process_peak())
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
    """Bytes; of a sparse tensor those of its entries."""
    parts = (t._values() if t.is_sparse else t for t in tensors)
    return sum(part.numel() * part.element_size() for part in parts)


def _process_peak() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _resident(name: str) -> int:
    """Bytes of this process in memory now (``VmRSS``) or at most (``VmHWM``); Linux."""
    match = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if match is None:
        raise OSError(f"no {name} in /proc/self/status")
    return int(match[1]) * 1024


def _of_files() -> int:
    """Bytes of them that hold pages of files, code of libraries nearly all; Linux from 4.5 on."""
    return _resident("RssFile")


def _free() -> str:
    """What a process could still get, where the system says so."""
    try:
        match = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        match = None
    return readable(int(match[1]) * 1024) if match else "an unknown part"
