"""Exact top-k with a rule for ties, so that a choice never depends on a sorting algorithm's mood.

Legend: R rows, N candidates, k chosen, G groups of g, B = k + 1, C = g B.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Rank = Tensor | Callable[[], Tensor] | None

_MAX_RANK = 2**32 - 1
_GROUP = 8


def top_k_first(score_RN: Tensor, k: int, rank_RN: Rank = None) -> Tensor:
    """(R, k) int64: positions of the k highest scores, best first; among equals the lower rank wins.

    ``torch.topk`` promises nothing about equals. In float32 the score's bits and the rank make one int64 key
    without equals, and ``topk`` of the keys is exact; other dtypes take stable sorts. On a CPU only rows in
    which two of the k + 1 best are equal are searched so: the others leave nothing to a rule.

    Args:
        score_RN: (R, N) floating, no NaN.
        k: 1 <= k <= N.
        rank_RN: (R, N) or (N,) int64 in [0, 2^32), the order among equals, or what returns it, asked only
            where there are equals; None: the position.

    >>> top_k_first(torch.tensor([[1.0, 3.0, 3.0, 2.0]]), 2)
    tensor([[1, 2]])
    >>> top_k_first(torch.tensor([[1.0, 3.0, 3.0, 2.0]]), 2, rank_RN=torch.tensor([3, 2, 1, 0]))
    tensor([[2, 1]])
    """
    score_RN = score_RN.detach()
    if not _is_quick(score_RN):
        return _ranked(score_RN, k, rank_RN() if callable(rank_RN) else rank_RN)
    pick = _by_groups if score_RN.shape[1] >= _GROUP * 2 * (k + 1) else _of_all
    best_RB, at_RB = pick(score_RN, min(k + 1, score_RN.shape[1]))
    at_RK, equal_RK = at_RB[:, :k], best_RB[:, 1:] == best_RB[:, :-1]
    if bool(equal_RK.any()):  # seldom; where the k + 1 best all differ, nothing is left to a rule for ties
        tied_R = equal_RK.any(dim=1)
        rank = rank_RN() if callable(rank_RN) else rank_RN
        rank = rank[tied_R] if rank is not None and rank.dim() == 2 else rank
        at_RK[tied_R] = _ranked(score_RN[tied_R], k, rank)
    return at_RK


def _is_quick(score_RN: Tensor) -> bool:
    """Whether to look at ties costs nothing: a device would have to be waited for."""
    return score_RN.dtype == torch.float32 and score_RN.is_cpu and not torch.compiler.is_compiling()


def _of_all(score_RN: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """(R, num) ordered bits of the best, best first, and where they stand; equals in any order."""
    best_RB, at_RB = score_RN.view(torch.int32).topk(num, dim=1)  # of integers it is quicker than of floats
    # Bits of positive floats stand in order as they are, above all others: seldom is one left to reorder.
    low_R = (best_RB[:, -1:] <= 0).any(dim=1)
    if bool(low_R.any()):
        best_RB[low_R], at_RB[low_R] = _ordered_bits(score_RN[low_R]).topk(num, dim=1)
    return best_RB, at_RB


def _by_groups(score_RN: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """The same where N is large: the best stand in as many groups, those of the highest maxima."""
    num_groups = score_RN.shape[1] // _GROUP
    grouped = num_groups * _GROUP
    score_RgG = score_RN[:, :grouped].unflatten(
        1, (_GROUP, num_groups)
    )  # a group is a column: quick to reduce
    group_RB = _of_all(score_RgG.amax(dim=1), num)[1]
    candidate_RC = score_RgG.gather(2, group_RB.unsqueeze(1).expand(-1, _GROUP, -1)).flatten(1)
    if grouped < score_RN.shape[1]:  # fewer than a group are left, and all of them are looked at
        candidate_RC = torch.cat([candidate_RC, score_RN[:, grouped:]], dim=1)
    best_RB, place_RB = _of_all(candidate_RC, num)
    at_RB = (place_RB // num) * num_groups + group_RB.gather(1, place_RB % num)
    return best_RB, torch.where(place_RB < _GROUP * num, at_RB, place_RB + (grouped - _GROUP * num))


def _ranked(score_RN: Tensor, k: int, rank_RN: Tensor | None) -> Tensor:
    """By keys without equals, of the score's bits and the rank."""
    if score_RN.dtype != torch.float32:
        return _by_sorting(score_RN, k, rank_RN)
    if rank_RN is None:
        rank_RN = torch.arange(score_RN.shape[1], device=score_RN.device)
    key_RN = _ordered_bits(score_RN).long().bitwise_left_shift_(32).bitwise_or_(_MAX_RANK - rank_RN)
    return key_RN.topk(k, dim=-1).indices


def _by_sorting(score_RN: Tensor, k: int, rank_RN: Tensor | None) -> Tensor:
    if rank_RN is None:
        return score_RN.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    by_rank_RN = rank_RN.expand_as(score_RN).sort(dim=-1, stable=True).indices
    order_RN = score_RN.gather(1, by_rank_RN).sort(dim=-1, descending=True, stable=True).indices
    return by_rank_RN.gather(1, order_RN[:, :k])


def _ordered_bits(score: Tensor) -> Tensor:
    """int32 in the order of the float32 scores, equal where they are."""
    bits = (score + 0.0).view(torch.int32)  # + 0.0: minus zero equals zero
    bits ^= (bits >> 31).bitwise_and_(0x7FFFFFFF)
    return bits
