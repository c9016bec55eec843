"""What the ranks of one run agree on, through the CPU's memory; with one rank, nothing happens.

All ranks run the same program on the same data, so most of what they know is the same without a word. What
may differ goes through here: what rank 0 decides, what each has summed up, whether one was asked to stop.
Every rank must call each of these functions equally often and in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cl_moe.errors import RunFailedError
from cl_moe.layers import ranks as layer_sums

T = TypeVar("T")
OUTCOMES = "rank_*.json"
"""Files in which ranks leave how they ended, in the folder that they were started from."""

_group: dist.ProcessGroup | None = None
_folder: Path | None = None
_in_pieces = False
_sharing = 1


def join(folder: Path | None = None) -> None:
    """Open the ways that agreements take; the default process group stands. On every rank, once.

    Args:
        folder: where ranks leave how they ended.
    """
    global _group, _folder, _sharing
    _group, _folder, _sharing = dist.new_group(backend="gloo"), folder, 1
    layer_sums.use_group(dist.new_group())


def leave() -> None:
    """Close them, before the default process group is."""
    global _group, _folder
    _group = _folder = None
    layer_sums.use_group(None)


def share_layers(size: int) -> dist.ProcessGroup:
    """Let so many ranks in a row compute the same rows together; returns the group of those with this one.

    On every rank, once, behind ``join``.
    """
    global _sharing
    _sharing = size
    every, mine = list(range(num_ranks())), None
    together = [dist.new_group(every[i : i + size]) for i in range(0, len(every), size)]
    for first in range(size):
        across = dist.new_group(every[first::size])
        mine = across if rank() % size == first else mine
    layer_sums.use_group(mine, len(every) // size)
    return together[rank() // size]


def num_ranks() -> int:
    """Ranks of the run, at least 1."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if num_ranks() > 1 else 0


def words() -> tuple[int, ...]:
    """What a seed depends on beside its purpose, if ranks are to draw differently for their own rows."""
    part = rank() // _sharing
    return (part,) if part else ()


def is_first() -> bool:
    """Whether this is the rank that decides, writes and speaks."""
    return rank() == 0


def folder() -> Path | None:
    """Where ranks leave how they ended; None for a run without ranks."""
    return _folder


def in_pieces() -> bool:
    """Whether no rank holds the whole model while it trains."""
    return _in_pieces


def hold_pieces() -> None:
    """From here on, no rank holds the whole model while it trains."""
    global _in_pieces
    _in_pieces = True


def from_first(make: Callable[[], T]) -> T:
    """What rank 0 makes; the others get a copy (on the CPU) and make nothing."""
    if num_ranks() == 1:
        return make()
    held = [make() if is_first() else None]
    dist.broadcast_object_list(held, src=0, group=_group)
    return held[0]  # type: ignore[return-value]


def of_all(mine: T) -> list[T]:
    """What each rank gave, in their order."""
    if num_ranks() == 1:
        return [mine]
    held: list[Any] = [None] * num_ranks()
    dist.all_gather_object(held, mine, group=_group)
    return held


def most(mine: int) -> int:
    """The largest number of any rank; costs far less than ``of_all``, so it may be asked in every step."""
    if num_ranks() == 1:
        return mine
    number = torch.tensor(mine)
    dist.all_reduce(number, dist.ReduceOp.MAX, group=_group)
    return int(number)


def most_each(mine: Tensor) -> Tensor:
    """The largest of any rank, element by element; of one shape on all ranks, in the CPU's memory."""
    if num_ranks() > 1:
        mine = mine.clone()
        dist.all_reduce(mine, dist.ReduceOp.MAX, group=_group)
    return mine


def averages(mine: Mapping[str, float]) -> dict[str, float]:
    """Of each name the ranks' average, 0 where a rank has none of it."""
    if num_ranks() == 1:
        return dict(mine)
    given = of_all(dict(mine))
    names = dict.fromkeys(name for one in given for name in one)
    return {name: sum(one.get(name, 0.0) for one in given) / len(given) for name in names}


def rows_of_all(mine: Tensor) -> Tensor:
    """Rows of all ranks, rank by rank, on the CPU; shapes and dtypes agree but for the number of rows."""
    return mine if num_ranks() == 1 else torch.cat(of_all(mine.detach().cpu())[::_sharing])


@torch.no_grad()
def share_values(module: nn.Module) -> None:
    """Give every rank rank 0's parameters and buffers."""
    if num_ranks() > 1:
        for value in module.state_dict(keep_vars=True).values():
            held = value.detach().to(torch.uint8 if value.dtype == torch.bool else value.dtype).contiguous()
            dist.broadcast(held, src=0)
            value.copy_(held)


def check_alike(module: nn.Module, when: str) -> None:
    """Hold parameters and buffers of all ranks against each other, by a sum of their bits.

    Raises:
        RunFailedError: names the first that differs.
    """
    if num_ranks() == 1:
        return
    state = module.state_dict()
    sums = of_all([_bits(value) for value in state.values()])
    for name, values in zip(state, zip(*sums, strict=True), strict=True):
        if len(set(values)) > 1:
            raise RunFailedError(
                f"ranks differ {when}: {name} is not the same on all {num_ranks()} of them, so they have "
                "trained different models\nchange: trainer.devices=1; and please report this as a defect"
            )


def _bits(value: Tensor) -> int:
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[value.element_size()]
    parts = value.contiguous().view(words).flatten().split(2**20)  # a sum in int64 makes a copy first
    return sum(int(part.sum(dtype=torch.int64)) for part in parts) % 2**63


class Part(NamedTuple):
    """A rank's rows of a batch, and what a mean over them weighs.

    Args:
        inputs: (B, ...).
        targets: (B,) or (B, S).
        mask: (B, S) bool, or None.
        num_new: rows of the stream, which come first.
        all_new: the same, of all ranks.
        share: parts of the batch x answers of this one / all answers: the average of ``share x mean`` is
            the mean over all; None with one rank.
    """

    inputs: Tensor
    targets: Tensor
    mask: Tensor | None
    num_new: int
    all_new: int
    share: float | None = None

    def weigh(self, term: Tensor) -> Tensor:
        """A mean over these rows, or what is the same on all ranks, as this rank's part of it."""
        if self.share is None:
            return term
        # a mean over no row is NaN, which times 0 would stay
        return term * self.share if self.share else term.nan_to_num() * 0.0


def part_of(
    inputs: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    num_new: int,
    asked: Callable[[Tensor], Tensor],
    device: torch.device,
) -> Part:
    """This rank's part of a batch that all ranks hold: as many new rows as the others, or one less or more.

    The same for the rows that a strategy put behind the new ones.

    Args:
        inputs: (B, ...) of the whole batch.
        targets: of the whole batch.
        mask: of the whole batch.
        num_new: of the whole batch.
        asked: number of answers that these targets ask for.
        device: of the model.
    """
    if num_ranks() == 1:
        return Part(inputs, targets, mask, num_new, num_new)
    new, added = _mine(num_new), _mine(len(targets) - num_new, num_new)

    def rows(x: Tensor) -> Tensor:
        return torch.cat([x[new], x[added]]).to(device)

    mine, total = rows(targets), int(asked(targets))
    share = int(asked(mine)) * (num_ranks() // _sharing) / total if total else 1.0
    own = None if mask is None else rows(mask)
    return Part(rows(inputs), mine, own, new.stop - new.start, num_new, share)


def _mine(count: int, first: int = 0) -> slice:
    part, parts = rank() // _sharing, num_ranks() // _sharing
    return slice(first + count * part // parts, first + count * (part + 1) // parts)


def outcomes() -> Iterable[Path]:
    """The files of ranks that have ended."""
    return sorted(_folder.glob(OUTCOMES)) if _folder is not None else ()
