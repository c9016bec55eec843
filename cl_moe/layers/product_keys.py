"""Product keys: a square grid of experts whose scores are sums of two sub-keys' scores, searched exactly.

Inside a grid the id of the expert at (row i, column j) is the Rosenberg-Strong shell index, so that the ids
of an m x m grid are exactly [0, m^2) whatever a larger grid holds.

Legend: Q queries (one per token and head), S = 2 sides, H half of the key width, m grid size, W = min(k, rows
or columns searched), P pairs looked at, C candidates found.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cl_moe.errors import InputError
from cl_moe.layers.checks import whole
from cl_moe.layers.selection import top_k_first


class Found(NamedTuple):
    """The best experts of a grid or of a part of it, best first.

    Args:
        score: (Q, C) the sums of their two sub-keys' scores, differentiable.
        expert: (Q, C) int64, ids inside the grid.
    """

    score: Tensor
    expert: Tensor


class Block(NamedTuple):
    """The crossing of some rows with some columns of a grid; both ranges have step 1 and are not empty."""

    rows: range
    columns: range


def joined(pieces: Sequence[Found]) -> Found:
    """What was found for one part of the queries after the other."""
    return Found(*(torch.cat(part) for part in zip(*pieces, strict=True)))


def grid_size(num_experts: int, key: str) -> int:
    """The m of a grid of m x m experts.

    >>> grid_size(16, key="layer.num_experts")
    4
    """
    whole("num_experts", num_experts, least=1, key=key)
    size = math.isqrt(num_experts)
    if size * size != num_experts:
        raise InputError(
            got=f"num_experts={num_experts}",
            allowed=f"a square number, such as {size**2} or {(size + 1) ** 2}",
            key=key,
        )
    return size


def shell_index(row: Tensor, column: Tensor) -> Tensor:
    """m^2 + m + row - column with m = max(row, column) (Rosenberg and Strong 1972): grids nest.

    >>> shell_index(torch.tensor([[0], [1], [2]]), torch.tensor([0, 1, 2]))
    tensor([[0, 1, 4],
            [3, 2, 5],
            [8, 7, 6]])
    """
    shell = torch.maximum(row, column)
    return shell * shell + shell + row - column


def shell_coordinates(expert: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column of ids in [0, 2^52); the inverse of ``shell_index``.

    >>> shell_coordinates(torch.arange(5))
    (tensor([0, 0, 1, 1, 0]), tensor([0, 1, 1, 0, 2]))
    """
    shell = expert.double().sqrt().floor().long()
    rest = expert - shell * shell
    return torch.minimum(rest, shell), torch.minimum(2 * shell - rest, shell)


def retrieve(query_QSH: Tensor, keys_SmH: Tensor, k: int) -> Found:
    """The exact top min(k, m^2) of a whole grid: ``search`` with the scores of its sub-keys, ties as there.

    Args:
        query_QSH: (Q, 2, H).
        keys_SmH: (2, m, H).
        k: >= 1.
    """
    return search([query_QSH[:, side] @ keys_SmH[side].t() for side in range(2)], k)


def search(score_Qm: Sequence[Tensor], k: int, blocks: Sequence[Block] | None = None) -> Found:
    """The exact top k of blocks of a grid, or all there are (1907.05242, section 3.2).

    In a block the k best sub-keys of each side suffice, and of their pairs only those that fewer than k pairs
    are sure to beat. Ties go to the lower shell, then to the lower row, then to the lower column. That holds
    where sub-keys have equal scores: two sums of different scores that rounding alone makes equal are told
    apart by those scores in a side's own top k, so there the better sub-key may win instead.

    Args:
        score_Qm: (Q, m) scores of the sub-keys of each of the two sides, no NaN.
        k: >= 1.
        blocks: disjoint parts of the grid; None: the whole of it.
    """
    rows, columns = (range(score.shape[1]) for score in score_Qm)
    blocks = [Block(rows, columns)] if blocks is None else blocks
    with torch.no_grad():
        pairs = [_useful_pairs_of(block, score_Qm, k) for block in blocks]
        row_QP, column_QP = (_joined(side) for side in zip(*pairs, strict=True))
        sum_QP = score_Qm[0].gather(1, row_QP) + score_Qm[1].gather(1, column_QP)
        total = sum(len(block.rows) * len(block.columns) for block in blocks)
        best_QC = top_k_first(sum_QP, min(k, total), rank_RN=lambda: tie_rank(row_QP, column_QP))
        row_QC, column_QC = row_QP.gather(1, best_QC), column_QP.gather(1, best_QC)
    score_QC = score_Qm[0].gather(1, row_QC) + score_Qm[1].gather(1, column_QC)
    return Found(score_QC, shell_index(row_QC, column_QC))


def shell_blocks(first: int, stop: int) -> list[Block]:
    """The shells first .. stop - 1 of a grid: new rows with every column, old rows with the new columns.

    >>> shell_blocks(0, 2)
    [Block(rows=range(0, 2), columns=range(0, 2))]
    >>> shell_blocks(2, 5)
    [Block(rows=range(2, 5), columns=range(0, 5)), Block(rows=range(0, 2), columns=range(2, 5))]
    """
    old_rows = [Block(range(first), range(first, stop))] if first else []
    return [Block(range(first, stop), range(stop)), *old_rows]


def blocks_of(shells: Sequence[range]) -> list[Block]:
    """The blocks of some shells of a grid; those that follow each other are searched as one.

    >>> blocks_of([range(0, 1), range(1, 2)]) == shell_blocks(0, 2)
    True
    """
    joined = [shells[0]]
    for shell in shells[1:]:
        if shell.start == joined[-1].stop:
            joined[-1] = range(joined[-1].start, shell.stop)
        else:
            joined.append(shell)
    return [block for shell in joined for block in shell_blocks(shell.start, shell.stop)]


def _useful_pairs_of(block: Block, score_Qm: Sequence[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """(Q, P) rows and columns of the pairs of a block that may be among its k best."""
    widths, best_QW = [], []
    for score, span in zip(score_Qm, block, strict=True):
        part = score if len(span) == score.shape[1] else score[:, span.start : span.stop]
        widths.append(min(k, len(span)))
        best_QW.append(top_k_first(part, widths[-1]) + span.start)
    places = _places(widths[0], widths[1], k)
    row_QP, column_QP = (
        torch.tensor(at, device=best.device).expand(best.shape[0], -1)
        for at, best in zip(places, best_QW, strict=True)
    )
    return best_QW[0].gather(1, row_QP), best_QW[1].gather(1, column_QP)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)


def _places(rows: int, columns: int, k: int) -> tuple[list[int], list[int]]:
    """Places (a, b) in the two sorted sides that count: see ``_useful_places``."""
    find = _useful_places.__wrapped__ if torch.compiler.is_compiling() else _useful_places
    return find(rows, columns, k)


@functools.cache
def _useful_places(rows: int, columns: int, k: int) -> tuple[list[int], list[int]]:
    """(a + 1)(b + 1) - 1 pairs are at least as good as the one at place (a, b)."""
    pairs = [(a, b) for a in range(rows) for b in range(columns) if (a + 1) * (b + 1) <= k]
    return [a for a, _ in pairs], [b for _, b in pairs]


def tie_rank(row: Tensor, column: Tensor) -> Tensor:
    """Shell, then row, then column: an order that grows with each coordinate, so that pruning respects it."""
    shell = torch.maximum(row, column)
    return shell * shell + row + torch.where(row == shell, column, 0)
