"""Product keys: a square grid of experts whose scores are sums of two sub-keys' scores, searched exactly.

A cohort is a grid of its own. Inside it the id of the expert at (row i, column j) is the Rosenberg-Strong
shell index, so that the ids of an m x m grid are exactly [0, m^2) whatever a larger grid holds.

Legend: Q queries (one per token and head), S = 2 sides, H half of the key width, m grid size, W = min(k, m),
C candidates of one cohort, K retrieved.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from cl_moe.errors import InputError
from cl_moe.layers.selection import top_k_first


class Found(NamedTuple):
    """The best experts of one cohort, best first.

    Args:
        score: (Q, C) the sums of their two sub-keys' scores, differentiable.
        expert: (Q, C) int64, ids inside the cohort.
    """

    score: Tensor
    expert: Tensor


def grid_size(num_experts: int, key: str) -> int:
    """The m of a grid of m x m experts.

    >>> grid_size(16, key="layer.num_experts")
    4
    """
    size = math.isqrt(max(num_experts, 0))
    if num_experts < 1 or size * size != num_experts:
        raise InputError(
            got=f"num_experts={num_experts}",
            allowed=f"a square number, such as {max(size, 1) ** 2} or {(size + 1) ** 2}",
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
    """The exact top min(k, m^2) of a cohort's grid (1907.05242, section 3.2).

    The W best sub-keys of each side suffice, and of their pairs only those that fewer than k pairs are sure
    to beat. Ties go to the lower shell, then to the lower row, then to the lower column.

    Args:
        query_QSH: (Q, 2, H).
        keys_SmH: (2, m, H).
        k: >= 1.
    """
    grid = keys_SmH.shape[1]
    score_Qm = [query_QSH[:, side] @ keys_SmH[side].t() for side in range(2)]
    with torch.no_grad():
        width = min(k, grid)
        best_QW = [top_k_first(score, width) for score in score_Qm]
        pair_row, pair_column = (torch.tensor(at, device=keys_SmH.device) for at in _useful_pairs(width, k))
        row_QP = best_QW[0].index_select(1, pair_row)
        column_QP = best_QW[1].index_select(1, pair_column)
        sum_QP = score_Qm[0].gather(1, row_QP) + score_Qm[1].gather(1, column_QP)
        best_QC = top_k_first(sum_QP, min(k, grid * grid), rank_RN=_tie_rank(row_QP, column_QP))
        row_QC, column_QC = row_QP.gather(1, best_QC), column_QP.gather(1, best_QC)
    score_QC = score_Qm[0].gather(1, row_QC) + score_Qm[1].gather(1, column_QC)
    return Found(score_QC, shell_index(row_QC, column_QC))


@functools.cache
def _useful_pairs(width: int, k: int) -> tuple[list[int], list[int]]:
    """Places (a, b) in the two sorted sides: (a + 1)(b + 1) - 1 pairs are at least as good as (a, b)."""
    pairs = [(a, b) for a in range(width) for b in range(width) if (a + 1) * (b + 1) <= k]
    return [a for a, _ in pairs], [b for _, b in pairs]


def _tie_rank(row: Tensor, column: Tensor) -> Tensor:
    """Shell, then row, then column: an order that grows with each coordinate, so that pruning respects it."""
    shell = torch.maximum(row, column)
    return shell * shell + row + torch.where(row == shell, column, 0)
