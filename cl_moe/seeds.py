"""Randomness by (seed, purpose), never from one global stream (law 10).

A number drawn for one purpose does not depend on how many were drawn for another before it, so a run that
was killed and resumed at a boundary draws the same numbers as one that was not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


def derive_seed(seed: int, *words: str | int) -> int:
    """A 63-bit seed that depends on every word, e.g. ``derive_seed(0, experience.index, "shuffle", epoch)``.

    >>> derive_seed(0, 1, "shuffle") == derive_seed(0, 1, "shuffle")
    True
    >>> len({derive_seed(0, 1, "shuffle"), derive_seed(0, 2, "shuffle"), derive_seed(1, 1, "shuffle")})
    3
    """
    text = "\x1f".join([str(seed), *(f"{type(word).__name__}:{word}" for word in words)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *words: str | int) -> torch.Generator:
    """A CPU generator of its own for one purpose."""
    return torch.Generator().manual_seed(derive_seed(seed, *words))


@contextmanager
def seeded(seed: int, *words: str | int) -> Iterator[None]:
    """Run a block under torch's global generators seeded for one purpose; put them back afterwards."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(derive_seed(seed, *words))
        yield


def generator_states() -> dict[str, list[Tensor]]:
    """Where torch's global generators stand: of the CPU, and of each CUDA device."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": [torch.get_rng_state()], "cuda": cuda}


def set_generator_states(states: Mapping[str, Sequence[Tensor]] | None) -> None:
    """Put them there again; on a machine with fewer devices, those that there are. None: leave them."""
    if states is None:  # of a checkpoint that another number of ranks wrote
        return
    torch.set_rng_state(states["cpu"][0])
    for device, state in zip(range(torch.cuda.device_count()), states["cuda"], strict=False):
        torch.cuda.set_rng_state(state, device)
