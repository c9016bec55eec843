"""Auxiliary and distillation losses: pure functions of tensors, unweighted.

Legend: T tokens, K choices per token, N experts, C classes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from cl_moe.errors import InputError


def load_balancing_loss(
    logits_TN: Tensor,
    choice_TK: Tensor,
    valid_T: Tensor | None = None,
    live_N: Tensor | None = None,
    over_ranks: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """N sum_i f_i P_i (2101.03961, equations 4 to 6): 1 at uniform, N if one expert takes all; scalar.

    f_i is the share of choices that fell on expert i before any capacity (over tokens x K for K > 1), P_i the
    mean router probability of i over the same choices. With ``live_N``, both look at live experts only: the
    softmax runs over the live logits and choices of frozen experts do not count, so that the loss pulls no
    token off the frozen ones (FORMULAS 6). 0 where no choice counts.

    Args:
        logits_TN: (T, N) raw router scores, float32 or wider.
        choice_TK: (T, K) int64 in [0, N), columns of ``logits_TN``.
        valid_T: (T,) bool, False on padding; None: all real.
        live_N: (N,) bool, False for frozen experts; None: all live.
        over_ranks: sums a tensor over the ranks of a distributed run, differentiably; None: one rank.

    >>> balanced = torch.tensor([[0], [1]])
    >>> load_balancing_loss(torch.zeros(2, 2), balanced)
    tensor(1.)
    >>> load_balancing_loss(torch.tensor([[50.0, 0.0], [50.0, 0.0]]), torch.tensor([[0], [0]]))
    tensor(2.)
    >>> load_balancing_loss(torch.zeros(2, 2), balanced, live_N=torch.tensor([False, False]))
    tensor(0.)
    """
    num_experts = logits_TN.shape[1]
    counted_TK = torch.ones_like(choice_TK, dtype=torch.bool)
    num_live: Tensor | int = num_experts
    if live_N is not None:
        counted_TK = counted_TK & live_N[choice_TK]
        num_live = live_N.sum()
        lowest = torch.finfo(logits_TN.dtype).min
        logits_TN = logits_TN.masked_fill(~live_N, lowest)
    if valid_T is not None:
        counted_TK = counted_TK & valid_T.unsqueeze(-1)
        logits_TN = logits_TN.masked_fill(~valid_T.unsqueeze(-1), 0.0)
    counted_TK = counted_TK.to(logits_TN.dtype)
    share_T = counted_TK.sum(dim=1)
    count_N = logits_TN.new_zeros(num_experts)
    count_N = count_N.index_add(0, choice_TK.reshape(-1), counted_TK.reshape(-1))  # whole numbers: exact
    probability_N = (share_T.unsqueeze(-1) * logits_TN.softmax(dim=-1)).sum(dim=0)
    if over_ranks is not None:
        count_N, probability_N = over_ranks(torch.stack([count_N, probability_N])).unbind()
    total = count_N.sum().clamp_min(1.0)
    return num_live * ((count_N / total) * (probability_N / total)).sum()


def router_z_loss(logits_TN: Tensor, valid_T: Tensor | None = None) -> Tensor:
    """Mean squared log-sum-exp of the raw router logits (ST-MoE, 2202.08906, equation 5); scalar, >= 0.

    Args:
        logits_TN: (T, N) raw router scores, float32 or wider.
        valid_T: (T,) bool, False on padding; None: all real. 0 where there is no real token.

    >>> router_z_loss(torch.zeros(3, 1))
    tensor(0.)
    >>> router_z_loss(torch.zeros(1, 1) + 2.0)
    tensor(4.)
    """
    square_T = logits_TN.logsumexp(dim=-1).square()
    if valid_T is None:
        return square_T.sum() / max(square_T.numel(), 1)
    return square_T.masked_fill(~valid_T, 0.0).sum() / valid_T.sum().clamp_min(1)


def distillation_loss(student_TC: Tensor, teacher_TC: Tensor, temperature: float = 1.0) -> Tensor:
    """temperature^2 KL(teacher || student) of the softened outputs, mean over rows (1503.02531, section 2).

    The factor keeps the gradient's size when the temperature changes. The teacher gets no gradient.

    Args:
        student_TC: (..., C) logits.
        teacher_TC: (..., C) logits.
        temperature: > 0.

    Returns:
        A scalar >= 0, nats.

    >>> logits = torch.tensor([[1.0, 2.0], [0.5, 0.0]])
    >>> distillation_loss(logits, logits + 3.0, temperature=2.0)
    tensor(0.)
    """
    if temperature <= 0:
        raise InputError(got=f"temperature={temperature}", allowed="a number > 0", key="temperature")
    student = nn.functional.log_softmax(student_TC / temperature, dim=-1)
    teacher = nn.functional.log_softmax(teacher_TC.detach() / temperature, dim=-1)
    divergence = (teacher.exp() * (teacher - student)).sum(dim=-1)
    return divergence.mean() * temperature**2
