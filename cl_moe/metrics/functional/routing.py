"""Routing metrics: who chooses what, held against who chose what before, and against who there is to choose.

Choices of a probe set are sets: what a token's experts are, not in which order or with which weight, heads of
a product-key layer together, and without pairs that a capacity dropped.

Legend: S probe tokens, P (token, expert) pairs, T experiences, N experts of a layer, C cohorts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cl_moe.errors import InputError


class Choices(NamedTuple):
    """Which experts each token of a probe set went to, at one layer.

    Args:
        expert: (P,) int32 ids for life, token by token, ascending, each once per token.
        size: (S,) int32, experts per token; 0 on padding, and for a token that nothing took.
        num_real: tokens that are no padding.
    """

    expert: Tensor
    size: Tensor
    num_real: int


def taker_shares(choices: Sequence[Choices]) -> Tensor:
    """(4,) float64 shares of real tokens computed by no expert, one or two, three or four, and more.

    The histogram of Zhou et al. 2022 (2202.09368, section 4.6) in its bins. NaN without tokens.

    >>> taker_shares([Choices(torch.arange(7).int(), torch.tensor([1, 2, 4, 0, 0]), 4)]).tolist()
    [0.25, 0.5, 0.25, 0.0]
    """
    size_S = torch.cat([found.size for found in choices])
    real = sum(found.num_real for found in choices)
    taken = [(size_S.ge(low) & size_S.le(high)).sum() for low, high in ((1, 2), (3, 4))]
    counts = torch.stack([real - size_S.gt(0).sum(), *taken, size_S.gt(4).sum()])
    return counts.double() / real


def routing_drift(now: Choices, then: Choices) -> Tensor:
    """Share of real tokens whose set of experts is not what it was, in [0, 1]; NaN without tokens.

    >>> then = Choices(torch.tensor([0, 1, 0, 2]), torch.tensor([2, 2]), 2)
    >>> now = Choices(torch.tensor([0, 1, 0, 3]), torch.tensor([2, 2]), 2)
    >>> routing_drift(now, then).item(), router_saturation(now, then).item()
    (0.5, 0.75)
    """
    both_S = _overlap(now, then)
    changed = ((both_S != now.size) | (both_S != then.size)).sum().double()
    return changed / then.num_real  # 0 / 0 is NaN


def router_saturation(now: Choices, then: Choices) -> Tensor:
    """Mean over tokens of |now & then| / |then|, in [0, 1] (OLMoE, 2409.02060: |now & then| / k).

    With k experts for every token |then| is k. Where a token's number of experts varies (Expert Choice, the
    second expert of GShard, drops, Mixture-of-Depths) it is the size of the set that the token had then;
    tokens that had none are left out. NaN if no token had any.
    """
    both_S, had_S = _overlap(now, then), then.size > 0
    return (both_S[had_S].double() / then.size[had_S]).mean()


def cohort_shares(score_TN: Tensor, sizes: Sequence[int]) -> Tensor:
    """(C, T) float64: share of each experience's routed weight that goes to each cohort; columns sum to 1.

    FORMULAS 2's leak as a matrix, birth cohort x experience. NaN for an experience of which nothing was
    routed.

    Args:
        score_TN: (T, N) >= 0, gating weights accumulated per expert on each experience's data (z).
        sizes: experts per cohort, oldest first; they add up to N.

    >>> cohort_shares(torch.tensor([[3., 0., 1.], [0., 0., 2.]]), [2, 1])
    tensor([[0.7500, 0.0000],
            [0.2500, 1.0000]], dtype=torch.float64)
    """
    if score_TN.ndim != 2 or sum(sizes) != score_TN.shape[1]:
        raise InputError(
            got=f"loads of shape {tuple(score_TN.shape)} and cohorts of {list(sizes)}",
            allowed="(T, N), and sizes that add up to N",
            key="sizes",
        )
    score_TN = score_TN.detach().double()
    parts = torch.stack([part_Tn.sum(dim=1) for part_Tn in score_TN.split(list(sizes), dim=1)])
    return parts / parts.sum(dim=0)


def leak(share_CT: Tensor, births: Sequence[int]) -> Tensor:
    """Mean over old experiences of the share of routed weight that goes to experts born after them.

    In [0, 1]. Old are all but the newest; every old experience counts once, however much data it has. NaN
    below two experiences; an experience of which nothing was routed is left out.

    Args:
        share_CT: (C, T) ``cohort_shares`` on the experiences trained so far, in order.
        births: of each cohort, experiences trained before its birth; born after the experience with index j
            means more than j of them.

    >>> leak(torch.tensor([[.75, .5, .1], [.25, .5, .9]]), births=[0, 1]).item()
    0.125
    """
    T = share_CT.shape[1]
    birth_C = torch.tensor(list(births), dtype=torch.int64, device=share_CT.device)
    later_CT = birth_C.unsqueeze(1) > torch.arange(T, device=share_CT.device)
    leak_T = (share_CT * later_CT).sum(dim=0)[: max(T - 1, 0)]
    return leak_T[~leak_T.isnan()].double().mean()  # of nothing: NaN


def task_information(count_TN: Tensor) -> Tensor:
    """I(experience; expert) / H(experience), minus what shuffled experiences would give; 1: one each.

    What is left by chance is not drawn but computed: the exact expectation over all shufflings of the
    experiences among the routed slots, with the margins as they are (Vinh, Epps & Bailey 2010, equation 24a,
    the correction of the adjusted mutual information). So 0 is chance, however few slots there are, and a
    value may be a little below. NaN for less than two experiences with slots.

    Args:
        count_TN: (T, N) int64, slots of each experience's data that were routed to each expert.

    >>> task_information(torch.tensor([[500, 0], [0, 500]])) > 0.998
    tensor(True)
    """
    if count_TN.ndim != 2 or count_TN.is_floating_point() or bool((count_TN < 0).any()):
        raise InputError(
            got=f"counts of shape {tuple(count_TN.shape)} and dtype {count_TN.dtype}",
            allowed="whole numbers >= 0 of shape (T, N)",
            key="count_TN",
        )
    count_TN = count_TN.detach().double().cpu()
    a_T, b_N = count_TN.sum(dim=1), count_TN.sum(dim=0)
    n = a_T.sum()
    if int((a_T > 0).sum()) < 2:
        return n.new_full((), torch.nan)
    # I = sum p ln p - sum p_T ln p_T - sum p_N ln p_N, p = count / n.
    information = (_xlogx(count_TN) - _xlogx(a_T) - _xlogx(b_N) + _xlogx(n)) / n
    entropy = (_xlogx(n) - _xlogx(a_T)) / n
    return (information - expected_information(a_T, b_N)) / entropy


def expected_information(a_T: Tensor, b_N: Tensor) -> Tensor:
    """Mean mutual information in nats of two labellings with these margins, shuffled (0-d float64).

    A cell's count is hypergeometric. Columns with equal sums have equal expectations, so each sum is computed
    once; of a distribution, what lies further out than 9 deviations and 12 is left away (below 1e-18).

    Args:
        a_T: (T,) row sums, float64.
        b_N: (N,) column sums, float64, of the same total.
    """
    n = a_T.sum()
    b_U, times_U = b_N[b_N > 0].unique(return_counts=True)
    total = n.new_zeros(())
    for a in a_T[a_T > 0]:
        mean_U = a * b_U / n
        reach_U = 12 + 9 * (mean_U * (1 - a / n) * (n - b_U) / max(n.item() - 1, 1)).clamp_min(0).sqrt()
        low_U = torch.maximum((mean_U - reach_U).floor(), (a + b_U - n).clamp_min(0))
        high_U = torch.minimum((mean_U + reach_U).ceil(), b_U.clamp_max(a))
        length_U = (high_U - low_U + 1).long()
        column = torch.arange(b_U.numel()).repeat_interleave(length_U)
        first_U = length_U.cumsum(0) - length_U
        k, b = (low_U - first_U)[column] + torch.arange(column.numel()), b_U[column]
        # ln of k! (b - k)! (a - k)! (n - a - b + k)!: the rest of a chance is the same in a column.
        cost = torch.stack([k, b - k, a - k, n - a - b + k]).add(1).lgamma().sum(dim=0)
        least_U = n.new_full(b_U.shape, torch.inf).scatter_reduce(0, column, cost, "amin")
        chance = torch.exp(least_U[column] - cost)
        term = torch.xlogy(k / n, n * k / (a * b))
        total_U, mass_U = (n.new_zeros(b_U.shape).index_add(0, column, c) for c in (chance * term, chance))
        total = total + (times_U * total_U / mass_U).sum()
    return total


def _overlap(now: Choices, then: Choices) -> Tensor:
    """(S,) experts that a token has in both."""
    if now.size.shape != then.size.shape or now.num_real != then.num_real:
        raise InputError(
            got=f"choices of {now.num_real} and of {then.num_real} real tokens",
            allowed="choices of the same probe set",
            key="then",
        )
    S = now.size.numel()
    ids = [int(choices.expert.max()) + 1 for choices in (now, then) if choices.expert.numel()]
    N = max(ids, default=1)
    keys = [
        torch.arange(S, device=size.device).repeat_interleave(size.long()) * N + expert
        for expert, size, _ in (now, then)
    ]
    pair_P, times_P = torch.cat(keys).unique(return_counts=True)
    return torch.bincount(pair_P[times_P == 2] // N, minlength=S)


def _xlogx(values: Tensor) -> Tensor:
    return torch.xlogy(values, values).sum()
