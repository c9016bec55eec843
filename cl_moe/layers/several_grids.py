"""One exact search over several cohorts: over their grids, in the time of one grid with as many sub-keys.

Legend: Q queries (one per token and head), C grids, S = 2 sides, m sub-keys of one grid's side, M those of
all grids, W = min(k, M), K retrieved.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cl_moe.layers.product_keys import Found, blocks_of, search, shell_index, tie_rank
from cl_moe.layers.selection import top_k_first


def search_grids(grids: Sequence[Sequence[Tensor]], firsts: Sequence[int], k: int) -> Found:
    """The exact top k of the union of several grids, best first, with ids for life.

    A row's best expert is where the best column of its grid crosses it. k rows whose best experts beat that
    of another row beat all its experts, so of all grids' rows the k with the best of such experts suffice; of
    the columns likewise. Ties go to the grid that stands first, then as inside a grid (``search``).

    Args:
        grids: of each grid the (Q, m) scores of the sub-keys of both sides, no NaN.
        firsts: the id of each grid's first expert, ascending.
        k: at most as many as there are experts.
    """
    if len(grids) == 1:
        score, expert = search(grids[0], k)
        return Found(score, expert + firsts[0])
    sides = list(zip(*grids, strict=True))
    score_SQM = [torch.cat(side, dim=1) for side in sides]
    first_C = torch.tensor(firsts, device=score_SQM[0].device)
    width_C = torch.tensor([score.shape[1] for score in sides[0]], device=first_C.device)
    start_C, num = width_C.cumsum(0) - width_C, score_SQM[0].shape[1]
    with torch.no_grad():
        width = min(k, num)
        grid_C = torch.arange(len(grids), device=first_C.device)
        grid_M = grid_C.repeat_interleave(width_C, output_size=num)  # to look up is quicker than to search
        at_SQW = [top_k_first(_with_best(sides[side], sides[1 - side]), width) for side in range(2)]
        grid_SQW = [grid_M[at_QW] for at_QW in at_SQW]
        score_QWW = _crossed([score.gather(1, at) for score, at in zip(score_SQM, at_SQW, strict=True)])
        score_QWW = score_QWW.masked_fill(grid_SQW[0].unsqueeze(2) != grid_SQW[1].unsqueeze(1), -torch.inf)

        def rank() -> Tensor:
            return _ranks(at_SQW, grid_SQW, start_C, first_C)

        best_QK = top_k_first(score_QWW.flatten(1), k, rank_RN=rank)
        place_SQK = best_QK // width, best_QK % width
        at_SQK = [at.gather(1, place) for at, place in zip(at_SQW, place_SQK, strict=True)]
        grid_QK = grid_SQW[0].gather(1, place_SQK[0])
        row_QK, column_QK = (at - start_C[grid_QK] for at in at_SQK)
    score_QK = score_SQM[0].gather(1, at_SQK[0]) + score_SQM[1].gather(1, at_SQK[1])
    return Found(score_QK, shell_index(row_QK, column_QK) + first_C[grid_QK])


def search_shells(scores: Sequence[Sequence[Tensor]], shells: Sequence[range], k: int) -> Found:
    """The exact top k of some shells of a grid that cohorts made larger, ids counted inside the grid.

    Args:
        scores: of each cohort up to the youngest that is searched, the (Q, m) scores of both sides.
        shells: the rows of the cohorts that are searched.
        k: at most as many as there are experts in them.
    """
    sides = [torch.cat([score[side] for score in scores], dim=1) for side in range(2)]
    return search(sides, k, blocks_of(shells))


def _with_best(own: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    """(Q, M): the score of the best expert of every sub-key of one side."""
    if torch.compiler.is_compiling():
        return torch.cat([a + b.amax(dim=1, keepdim=True) for a, b in zip(own, other, strict=True)], dim=1)
    widths = [a.shape[1] for a in own]
    best_QM = own[0].new_empty(own[0].shape[0], sum(widths))
    for best_Qm, a, b in zip(best_QM.split(widths, dim=1), own, other, strict=True):
        torch.add(a, b.amax(dim=1, keepdim=True), out=best_Qm)
    return best_QM


def _crossed(side_SQW: Sequence[Tensor]) -> Tensor:
    return side_SQW[0].unsqueeze(2) + side_SQW[1].unsqueeze(1)


def _ranks(at_SQW: Sequence[Tensor], grid_SQW: Sequence[Tensor], start_C: Tensor, first_C: Tensor) -> Tensor:
    """(Q, W W): the order among equals."""
    row_QW, column_QW = (at - start_C[grid] for at, grid in zip(at_SQW, grid_SQW, strict=True))
    rank_QWW = tie_rank(row_QW.unsqueeze(2), column_QW.unsqueeze(1)) + first_C[grid_SQW[0]].unsqueeze(2)
    return rank_QWW.flatten(1)
