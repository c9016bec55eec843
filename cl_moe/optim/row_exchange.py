"""Gradients of rows among ranks that all hold the whole table: what was touched is exchanged, not the table.

Legend: D width, W ranks, U rows that this rank touched, most the largest U of any rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from cl_moe.layers import ranks
from cl_moe.layers.tables import ExpertTable, dense_gradients, row_gradient, sparse_rows, summed_rows

_WHOLE = -1


@torch.no_grad()
def exchange_rows(tables: Sequence[ExpertTable]) -> int:
    """Give every rank the ranks' average of the gradients of these tables; returns the bytes that it sent.

    Every rank hands its rows to every other, and adds up what it gets rank by rank, so that all get the same
    bits; where so many rows were touched that a sum over whole tables sends less, that is taken. A table of
    which some rank has a dense gradient is averaged as a whole. Nobody's gradient stays none.

    Args:
        tables: the same on every rank, in the same order.
    """
    if ranks.num_ranks() == 1 or not tables:
        return 0
    mine = [row_gradient(table) for table in tables]
    counts = [
        len(rows[0]) if rows is not None else 0 if table.grad is None else _WHOLE
        for table, rows in zip(tables, mine, strict=True)
    ]
    device, others = tables[0].device, ranks.num_ranks() - 1
    sizes_WN = torch.stack(_all(torch.tensor(counts, device=device)))
    sent = others * len(tables) * sizes_WN.element_size()
    for table, rows, size_W in zip(tables, mine, sizes_WN.t().tolist(), strict=True):
        if _WHOLE in size_W:
            table.grad = torch.zeros_like(table) if table.grad is None else table.grad
            dense_gradients([table])
            dist.all_reduce(table.grad, group=ranks.group())
            table.grad /= ranks.num_ranks()
            sent += 2 * others * table.nbytes // ranks.num_ranks()  # as a ring does it
        elif most := max(size_W):
            empty = torch.empty(0, dtype=torch.long, device=device), table.new_empty(0, table.shape[1])
            row_U, value_UD = rows or empty
            handed = others * most * (row_U.element_size() + table.shape[1] * table.element_size())
            ring = 2 * others * (table.nbytes + len(table)) // ranks.num_ranks()
            summed = _by_hand(row_U, value_UD, size_W) if handed <= ring else _by_ring(row_U, value_UD, table)
            sent += min(handed, ring)
            table.grad = sparse_rows(summed[0], summed[1] / ranks.num_ranks(), len(table))
    return sent


def _by_hand(row_U: Tensor, value_UD: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The rows of all ranks and their sums: every rank gets every other's."""
    return summed_rows(_joined(row_U, sizes), _joined(value_UD, sizes))


def _by_ring(row_U: Tensor, value_UD: Tensor, table_ND: Tensor) -> tuple[Tensor, Tensor]:
    """The same by two sums over ranks, of all rows and of who was touched: cheaper where most are."""
    sum_ND = torch.zeros_like(table_ND).index_copy_(0, row_U, value_UD)
    touched_N = torch.zeros(len(table_ND), dtype=torch.uint8, device=row_U.device)
    touched_N[row_U] = 1
    dist.all_reduce(sum_ND, group=ranks.group())
    dist.all_reduce(touched_N, dist.ReduceOp.MAX, group=ranks.group())
    row_U = touched_N.nonzero().squeeze(1)
    return row_U, sum_ND[row_U]


def _joined(mine_UX: Tensor, sizes: Sequence[int]) -> Tensor:
    """What the ranks have, one behind the other; padded on its way."""
    padded = mine_UX.new_zeros(max(sizes), *mine_UX.shape[1:])
    padded[: len(mine_UX)] = mine_UX
    return torch.cat([part[:size] for part, size in zip(_all(padded), sizes, strict=True)])


def _all(mine: Tensor) -> list[Tensor]:
    parts = [torch.empty_like(mine) for _ in range(ranks.num_ranks())]
    dist.all_gather(parts, mine.contiguous(), group=ranks.group())
    return parts
