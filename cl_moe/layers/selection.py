"""Exact top-k with a rule for ties, so that a choice never depends on a sorting algorithm's mood.

Legend: R rows, N candidates, k chosen, G groups of g, B = k + 1, C = g B.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_MAX_RANK = 2**32 - 1
_GROUP = 8


def top_k_first(score_RN: Tensor, k: int, rank_RN: Tensor | None = None) -> Tensor:
    """(R, k) int64: positions of the k highest scores, best first; among equals the lower rank wins.

    ``torch.topk`` promises nothing about equals. In float32 the score's bits and the rank make one int64 key
    without equals, and ``topk`` of the keys is exact (and no slower); other dtypes take stable sorts. Of many
    scores on a CPU only those of promising groups are looked at (``_by_groups``); the choice is the same.

    Args:
        score_RN: (R, N) floating, no NaN.
        k: 1 <= k <= N.
        rank_RN: (R, N) or (N,) int64 in [0, 2^32), the order among equals; None: the position.

    >>> top_k_first(torch.tensor([[1.0, 3.0, 3.0, 2.0]]), 2)
    tensor([[1, 2]])
    >>> top_k_first(torch.tensor([[1.0, 3.0, 3.0, 2.0]]), 2, rank_RN=torch.tensor([3, 2, 1, 0]))
    tensor([[2, 1]])
    """
    score_RN = score_RN.detach()
    if rank_RN is None and _groups_pay(score_RN, k):
        return _by_groups(score_RN, k)
    return _ranked(score_RN, k, rank_RN)


def _ranked(score_RN: Tensor, k: int, rank_RN: Tensor | None) -> Tensor:
    if score_RN.dtype != torch.float32:
        return _by_sorting(score_RN, k, rank_RN)
    if rank_RN is None:
        rank_RN = torch.arange(score_RN.shape[1], device=score_RN.device)
    bits_RN = (score_RN + 0.0).view(torch.int32)  # + 0.0: minus zero equals zero
    bits_RN ^= (bits_RN >> 31).bitwise_and_(0x7FFFFFFF)  # integers in the order of the floats
    key_RN = bits_RN.long().bitwise_left_shift_(32).bitwise_or_(_MAX_RANK - rank_RN)
    return key_RN.topk(k, dim=-1).indices


def _by_sorting(score_RN: Tensor, k: int, rank_RN: Tensor | None) -> Tensor:
    if rank_RN is None:
        return score_RN.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    by_rank_RN = rank_RN.expand_as(score_RN).sort(dim=-1, stable=True).indices
    order_RN = score_RN.gather(1, by_rank_RN).sort(dim=-1, descending=True, stable=True).indices
    return by_rank_RN.gather(1, order_RN[:, :k])


def _groups_pay(score_RN: Tensor, k: int) -> bool:
    """Whether the candidates of k + 1 groups are few; elsewhere than on a CPU a look at ties would wait."""
    many = score_RN.shape[1] >= _GROUP * 2 * (k + 1)
    return many and score_RN.shape[0] > 0 and score_RN.is_cpu and not torch.compiler.is_compiling()


def _by_groups(score_RN: Tensor, k: int) -> Tensor:
    """The same where N is large: the k + 1 best stand in the k + 1 groups of the highest maxima.

    Where these k + 1 differ from each other, nothing is left to a rule for ties; the rows in which two of
    them are equal are searched whole.
    """
    num_rows, num = score_RN.shape
    num_groups = -(-num // _GROUP)
    if num % _GROUP:
        missing = num_groups * _GROUP - num
        score_RN = nn.functional.pad(score_RN, (0, missing), value=-torch.inf)
    score_RgG = score_RN.view(
        num_rows, _GROUP, num_groups
    )  # a group is a column: its maximum needs no shuffling
    group_RB = score_RgG.amax(dim=1).topk(k + 1, dim=1).indices
    candidate_RC = score_RgG.gather(2, group_RB.unsqueeze(1).expand(-1, _GROUP, -1)).reshape(num_rows, -1)
    best_RB, place_RB = candidate_RC.topk(k + 1, dim=1)
    group_RB, member_RB = group_RB.gather(1, place_RB % (k + 1)), place_RB // (k + 1)
    at_RK = (member_RB * num_groups + group_RB)[:, :k]
    tied_R = (best_RB[:, 1:] == best_RB[:, :-1]).any(dim=1)
    if bool(tied_R.any()):
        at_RK[tied_R] = _ranked(score_RN[tied_R][:, :num], k, None)
    return at_RK
