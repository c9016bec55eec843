"""Memory that one tensor after another uses, each when the last one is gone.

A large block that is freed goes back to the system, and the next one costs a page fault every 4 KiB: for the
gradients of a million experts' rows more than their computation.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_SPARE = 1.125  # so that a tensor a little larger than the last still fits


class Reused:
    """Room for one tensor at a time.

    Who still holds a tensor, a view of it or its storage keeps it: there is a new block for the next one
    then. A copy, pickled or not, starts without memory.
    """

    def __init__(self) -> None:
        self._block: mmap.mmap | None = None
        self._lease: weakref.ref[memoryview] | None = None

    def empty(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """An uninitialised tensor of this shape, with dtype and device of ``like``; on a CPU in this room."""
        size = math.prod(shape) * like.element_size()
        if not like.is_cpu or size == 0:
            return like.new_empty(shape)
        if self._block is None or len(self._block) < size or self._is_in_use():
            self._block = _fresh(math.ceil(size * _SPARE))
        lease = memoryview(self._block)  # torch holds it until the last tensor of this storage is gone
        self._lease = weakref.ref(lease)
        return torch.frombuffer(lease, dtype=like.dtype, count=math.prod(shape)).view(*shape)

    def release(self) -> None:
        """Give the memory back, as soon as nobody holds the last tensor."""
        self._block = self._lease = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Reused, ()

    def _is_in_use(self) -> bool:
        return self._lease is not None and self._lease() is not None


def _fresh(size: int) -> mmap.mmap:
    """Memory of this process alone, in large pages where the system has them."""
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            block.madvise(mmap.MADV_HUGEPAGE)
    return block
