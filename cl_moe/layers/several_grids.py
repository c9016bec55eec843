"""One exact search over several cohorts: over their grids, in the time of one grid with as many sub-keys.

Legend: Q queries (one per token and head), C grids, S = 2 sides, m sub-keys of one grid's side, M those of
all grids, W = min(k, M), K retrieved.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cl_moe.layers.product_keys import Found, blocks_of, search, shell_index, tie_rank
from cl_moe.layers.selection import top_k_first


class KeyScores(NamedTuple):
    """Scores of the sub-keys of some cohorts, one cohort after the other.

    Args:
        sides: the (Q, M) of rows and of columns, no NaN.
        widths: how many of the M are each cohort's, oldest first.
    """

    sides: Sequence[Tensor]
    widths: Sequence[int]

    def of(self, place: int) -> KeyScores:
        """Those of one cohort alone."""
        at = slice(start := sum(self.widths[:place]), start + self.widths[place])
        return KeyScores([side[:, at] for side in self.sides], [self.widths[place]])


def search_grids(scores: KeyScores, firsts: Sequence[int], k: int) -> Found:
    """The exact top k of the union of several grids, best first, with ids for life.

    A row's best expert is where the best column of its grid crosses it. k rows whose best experts beat that
    of another row beat all its experts, so of all grids' rows the k with the best of such experts suffice; of
    the columns likewise. Ties go to the grid that stands first, then as inside a grid (``search``).

    Args:
        scores: of grids that stand side by side.
        firsts: the id of each grid's first expert, ascending.
        k: at most as many as there are experts.
    """
    score_SQM, widths = scores
    if len(widths) == 1:
        score, expert = search(score_SQM, k)
        return Found(score, expert + firsts[0])
    first_C = torch.tensor(firsts, device=score_SQM[0].device)
    width_C = torch.tensor(widths, device=first_C.device)
    start_C, num = width_C.cumsum(0) - width_C, score_SQM[0].shape[1]
    with torch.no_grad():
        width = min(k, num)
        grid_C = torch.arange(len(widths), device=first_C.device)
        grid_M = grid_C.repeat_interleave(width_C, output_size=num)  # to look up is quicker than to search
        at_SQW = _rows_and_columns(score_SQM, widths, width)
        grid_SQW = [grid_M.take(at_QW) for at_QW in at_SQW]
        score_QWW = _crossed([score.gather(1, at) for score, at in zip(score_SQM, at_SQW, strict=True)])
        one_QWW = grid_SQW[0].unsqueeze(2) == grid_SQW[1].unsqueeze(1)
        score_QWW = torch.where(one_QWW, score_QWW, -torch.inf)

        def rank() -> Tensor:
            return _ranks(at_SQW, grid_SQW, start_C, first_C)

        best_QK = top_k_first(score_QWW.flatten(1), k, rank_RN=rank)
        place_SQK = best_QK // width, best_QK % width
        at_SQK = [at.gather(1, place) for at, place in zip(at_SQW, place_SQK, strict=True)]
        grid_QK = grid_SQW[0].gather(1, place_SQK[0])
        row_QK, column_QK = (at - start_C[grid_QK] for at in at_SQK)
    score_QK = score_SQM[0].gather(1, at_SQK[0]) + score_SQM[1].gather(1, at_SQK[1])
    return Found(score_QK, shell_index(row_QK, column_QK) + first_C[grid_QK])


def search_shells(scores: KeyScores, shells: Sequence[range], k: int) -> Found:
    """The exact top k of some shells of a grid that cohorts made larger, ids counted inside the grid.

    Args:
        scores: of all cohorts up to the youngest that is searched.
        shells: the rows of the cohorts that are searched.
        k: at most as many as there are experts in them.
    """
    return search(scores.sides, k, blocks_of(shells))


def _rows_and_columns(score_SQM: Sequence[Tensor], widths: Sequence[int], num: int) -> list[Tensor]:
    """(Q, num) of each side: where the sub-keys stand that have the best of all best experts."""
    best_QM = None if torch.compiler.is_compiling() else torch.empty_like(score_SQM[0])
    found = []
    for own_QM, other_QM in (score_SQM, score_SQM[::-1]):
        sides = _stretches(own_QM, widths), _stretches(other_QM, widths)
        if best_QM is None:
            bests = [own + other.amax(dim=2, keepdim=True) for own, other in zip(*sides, strict=True)]
            lifted_QM = torch.cat([best.flatten(1) for best in bests], dim=1)
        else:  # for both sides in one place
            for best, own, other in zip(_stretches(best_QM, widths), *sides, strict=True):
                torch.add(own, other.amax(dim=2, keepdim=True), out=best)
            lifted_QM = best_QM
        found.append(top_k_first(lifted_QM, num))
    return found


def _stretches(score_QM: Tensor, widths: Sequence[int]) -> list[Tensor]:
    """(Q, grids, m): grids of one width together, others one by one."""
    if len(set(widths)) == 1:
        return [score_QM.unflatten(1, (len(widths), widths[0]))]
    return [score_Qm.unsqueeze(1) for score_Qm in score_QM.split(list(widths), dim=1)]


def _crossed(side_SQW: Sequence[Tensor]) -> Tensor:
    return side_SQW[0].unsqueeze(2) + side_SQW[1].unsqueeze(1)


def _ranks(at_SQW: Sequence[Tensor], grid_SQW: Sequence[Tensor], start_C: Tensor, first_C: Tensor) -> Tensor:
    """(Q, W W): the order among equals."""
    row_QW, column_QW = (at - start_C[grid] for at, grid in zip(at_SQW, grid_SQW, strict=True))
    rank_QWW = tie_rank(row_QW.unsqueeze(2), column_QW.unsqueeze(1)) + first_C[grid_SQW[0]].unsqueeze(2)
    return rank_QWW.flatten(1)
