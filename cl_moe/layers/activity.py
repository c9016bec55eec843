"""How active hidden units are, over the tokens that reach them.

Legend: U hidden units, n experts of a cohort, H hidden width, M rows sorted by expert, n1 = n + 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Activity(NamedTuple):
    """Sums over tokens, so that batches add up.

    Args:
        total: (U,) float64, sum of |h|.
        reached: (U,) int64, tokens that reached the unit: for an expert's units those routed to it.
    """

    total: Tensor
    reached: Tensor

    def plus(self, other: Activity) -> Activity:
        """Both together."""
        return Activity(self.total + other.total, self.reached + other.reached)

    @property
    def mean(self) -> Tensor:
        """(U,) float64: E|h| over the tokens that reached a unit; 0 for one that none reached."""
        return self.total / self.reached.clamp_min(1)


def joined(parts: Sequence[Activity]) -> Activity:
    """The units of several parts of a layer, one part after the other."""
    return Activity(torch.cat([part.total for part in parts]), torch.cat([part.reached for part in parts]))


def of_units(hidden_TH: Tensor, valid_T: Tensor | None = None) -> Activity:
    """Of units that every real token reaches.

    Args:
        hidden_TH: (..., H) activations.
        valid_T: (...) bool, False on padding; None where there is none.
    """
    size_H = hidden_TH.abs().double().reshape(-1, hidden_TH.shape[-1])
    if valid_T is not None:
        size_H = size_H[valid_T.reshape(-1)]
    return Activity(size_H.sum(dim=0), torch.full_like(size_H[:0].sum(dim=0), len(size_H)).long())


def of_experts(hidden_MH: Tensor, start_n1: Tensor) -> Activity:
    """Of the units of a cohort's experts, expert by expert, (n H).

    Args:
        hidden_MH: (M, H) activations, those of expert e at ``start_n1[e] : start_n1[e + 1]``.
        start_n1: (n + 1,) int64, from 0 to M.
    """
    count_n = start_n1.diff()
    expert_M = torch.arange(len(count_n), device=count_n.device).repeat_interleave(count_n)
    total_nH = hidden_MH.new_zeros(len(count_n), hidden_MH.shape[1], dtype=torch.float64)
    total_nH.index_add_(0, expert_M, hidden_MH.abs().double())
    return Activity(total_nH.reshape(-1), count_n.repeat_interleave(hidden_MH.shape[1]))
