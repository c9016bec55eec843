"""Batches of tensors held in memory, in an order drawn from (seed, experience, epoch)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler, TensorDataset

from cl_moe.seeds import generator
from cl_moe.stream import IGNORE, Streamed


class Order(Sampler[Tensor]):
    """Rows of each batch: shuffled anew every epoch, or in order. The last batch may be smaller.

    Lightning calls ``set_epoch`` with an epoch number that goes on over the whole stream, so no epoch's order
    depends on what was drawn before it, and a resumed run meets the same one.

    Attributes:
        skip: batches that the next pass, and only that one, leaves out: they were trained before a restart.
        block: rows among which an order is drawn, block after block; None: among all.
    """

    def __init__(
        self,
        num_rows: int,
        batch_size: int,
        shuffle: tuple[int, int] | None = None,
        block: int | None = None,
    ) -> None:
        self.num_rows, self.batch_size, self.shuffle, self.block = num_rows, batch_size, shuffle, block
        self.epoch, self.skip = 0, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass."""
        self.epoch = epoch

    def begin_at(self, epoch: int, skip: int) -> None:
        """Let the next pass be the rest of an epoch: after its first ``skip`` batches."""
        self.epoch, self.skip = epoch, skip

    def __len__(self) -> int:
        return -(-self.num_rows // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        if self.block is not None:
            skip, self.skip = self.skip, 0
            return self._by_blocks(self.block, skip)
        if self.shuffle is None:
            rows = torch.arange(self.num_rows)
        else:
            seed, experience = self.shuffle
            draw = generator(seed, experience, "order", self.epoch)
            rows = torch.randperm(self.num_rows, generator=draw)
        skip, self.skip = self.skip, 0
        return iter(rows.split(self.batch_size)[skip:])

    def _by_blocks(self, block: int, skip: int) -> Iterator[Tensor]:
        """Batches of rows, of which no more than two blocks are in question at a time."""
        assert self.shuffle is not None
        begin = skip * self.batch_size
        waiting, behind = torch.empty(0, dtype=torch.int64), begin % block
        for first in range(begin - behind, self.num_rows, block):
            draw = generator(*self.shuffle, "order", self.epoch, first // block)
            order = first + torch.randperm(min(block, self.num_rows - first), generator=draw)
            waiting, behind = torch.cat([waiting, order[behind:]]), 0
            whole = len(waiting) - len(waiting) % self.batch_size
            yield from waiting[:whole].split(self.batch_size) if whole else ()
            waiting = waiting[whole:]
        if len(waiting):
            yield waiting


def training_loader(data: TensorDataset, batch_size: int, seed: int, experience: int) -> DataLoader:
    """Every row once per epoch, shuffled by (seed, experience, epoch)."""
    return _loader(data, order_of(data, batch_size, seed, experience))


def order_of(data: TensorDataset, batch_size: int, seed: int, experience: int) -> Order:
    """The order of a training loader; of data that are streamed, drawn within blocks."""
    block = data.block if isinstance(data, Streamed) else None
    return Order(len(data), batch_size, (seed, experience), block)


def evaluation_loader(data: TensorDataset, batch_size: int) -> DataLoader:
    """Every row once, in order."""
    return _loader(data, Order(len(data), batch_size))


def _loader(data: TensorDataset, order: Order) -> DataLoader:
    # batch_size=None: the sampler's rows index the tensors at once, one index_select per batch. The generator
    # keeps the loader from drawing its worker seed out of torch's global one.
    return DataLoader(data, batch_size=None, sampler=order, generator=torch.Generator())


def probe_rows(num_rows: int, samples: int) -> Tensor:
    """At most ``samples`` of the rows, ascending; drawn by no seed of a run, so that runs compare."""
    order = torch.randperm(num_rows, generator=generator(0, "probe", num_rows))
    return order[:samples].sort().values


def is_asked(targets: Tensor) -> Tensor:
    """Where there is something to answer, bool of the same shape: not on padding; of numbers, everywhere."""
    return torch.ones_like(targets, dtype=torch.bool) if targets.is_floating_point() else targets != IGNORE


def padding_mask(targets: Tensor) -> Tensor | None:
    """(B, S) bool, False on padding; None where there is none, which spares the layers the work."""
    mask = is_asked(targets)
    return None if bool(mask.all()) else mask


def broken_inputs(inputs: Tensor) -> list[str]:
    """How many examples of a batch are not finite, and which is the first, in words; empty if none is."""
    broken_B = ~inputs.isfinite().reshape(len(inputs), -1).all(dim=1)
    if not broken_B.any():
        return []
    count, first = int(broken_B.sum()), int(broken_B.nonzero()[0])
    return [f"{count} of its {len(inputs)} inputs not finite themselves (the first is {first})"]
