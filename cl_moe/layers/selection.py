"""Exact top-k with a rule for ties, so that a choice never depends on a sorting algorithm's mood.

Legend: R rows, N candidates, k chosen.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MAX_RANK = 2**32 - 1


def top_k_first(score_RN: Tensor, k: int, rank_RN: Tensor | None = None) -> Tensor:
    """(R, k) int64: positions of the k highest scores, best first; among equals the lower rank wins.

    ``torch.topk`` promises nothing about equals. In float32 the score's bits and the rank make one int64 key
    without equals, and ``topk`` of the keys is exact (and no slower); other dtypes take stable sorts.

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
