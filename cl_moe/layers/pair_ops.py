"""The computations of ``pairs.py`` over tables in several cohorts, closed to the compiler.

``torch.compile`` looks into an operator that is registered with torch no further, so sparse kernels and sorts
of data-dependent size cause no graph break. The three operators are each other's derivatives. Without a
compiler the layers call ``pairs.py`` directly.

Legend: T tokens, K choices per token, D width, n experts of one cohort, P pairs of one cohort.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cl_moe.layers.pairs import Pairs, pair_dot, pair_sum, sorted_columns


def own_pairs(expert_TK: Tensor, first: int, num_experts: int) -> tuple[Tensor, Pairs]:
    """Where the choices of one cohort's experts stand, and the pairs of tokens and these experts.

    Args:
        expert_TK: (T, K) int64, ids for life.
        first: the id of the cohort's first expert.
        num_experts: n.

    Returns the (P,) places in the flattened choice, ascending, and the pairs token -> expert of the cohort.
    """
    own_TK = (expert_TK >= first) & (expert_TK < first + num_experts)
    at_P = own_TK.reshape(-1).nonzero().squeeze(-1)
    start_T1 = nn.functional.pad(own_TK.sum(dim=1).cumsum(dim=0), (1, 0))
    expert_P = expert_TK.reshape(-1)[at_P] - first
    return at_P, Pairs(start_T1, expert_P, num_experts, max_per_row=own_TK.shape[1])


def pairs_by_cohort(
    expert_TK: Tensor, firsts: Sequence[int], sizes: Sequence[int]
) -> tuple[Tensor, list[Pairs]]:
    """``own_pairs`` of every cohort, the places one cohort after the other in one tensor (T K,).

    Args:
        expert_TK: (T, K) int64, ids for life, all of these cohorts.
        firsts: the id of each cohort's first expert, ascending.
        sizes: how many experts each has.
    """
    num_tokens, per_token = expert_TK.shape
    expert_P = expert_TK.reshape(-1)
    cohort_P = torch.bucketize(expert_P, torch.tensor(firsts[1:], device=expert_P.device), right=True)
    counts = cohort_P.bincount(minlength=len(firsts)).tolist()
    at_P = sorted_columns(cohort_P, len(firsts))[1]
    token_T1 = torch.arange(num_tokens + 1, device=expert_P.device) * per_token
    pairs = []
    for own_P, first, size in zip(at_P.split(counts), firsts, sizes, strict=True):
        start_T1 = torch.searchsorted(own_P, token_T1)
        pairs.append(Pairs(start_T1, expert_P.index_select(0, own_P) - first, size, max_per_row=per_token))
    return at_P, pairs


@torch.library.custom_op("cl_moe::table_dot", mutates_args=())
def table_dot(x_TD: Tensor, tables: Sequence[Tensor], expert_TK: Tensor, firsts: Sequence[int]) -> Tensor:
    """(T, K): ``x[t] . row`` of every choice; the row of expert ``firsts[c] + i`` is row i of table c."""
    out = x_TD.new_zeros(expert_TK.numel())
    for table_nD, first in zip(tables, firsts, strict=True):
        at_P, pairs = own_pairs(expert_TK, first, table_nD.shape[0])
        out[at_P] = pair_dot(x_TD, table_nD, pairs)
    return out.reshape(expert_TK.shape)


@torch.library.custom_op("cl_moe::table_sum", mutates_args=())
def table_sum(
    weight_TK: Tensor, tables: Sequence[Tensor], expert_TK: Tensor, firsts: Sequence[int]
) -> Tensor:
    """(T, D): for every token the sum of weight x row over its choices."""
    out_TD = weight_TK.new_zeros(weight_TK.shape[0], tables[0].shape[1])
    for table_nD, first in zip(tables, firsts, strict=True):
        at_P, pairs = own_pairs(expert_TK, first, table_nD.shape[0])
        out_TD += pair_sum(weight_TK.reshape(-1)[at_P], table_nD, pairs)
    return out_TD


@torch.library.custom_op("cl_moe::table_grad", mutates_args=())
def table_grad(
    weight_TK: Tensor, x_TD: Tensor, expert_TK: Tensor, firsts: Sequence[int], sizes: Sequence[int]
) -> list[Tensor]:
    """For every table (n, D): for each of its rows the sum of weight x x[t] over the choices of that row."""
    grads = []
    for first, size in zip(firsts, sizes, strict=True):
        at_P, pairs = own_pairs(expert_TK, first, size)
        by_expert, order_P = pairs.transpose()
        grads.append(pair_sum(weight_TK.reshape(-1)[at_P][order_P], x_TD, by_expert))
    return grads


@table_dot.register_fake
def _(x_TD: Tensor, tables: Sequence[Tensor], expert_TK: Tensor, firsts: Sequence[int]) -> Tensor:
    return x_TD.new_empty(expert_TK.shape)


@table_sum.register_fake
def _(weight_TK: Tensor, tables: Sequence[Tensor], expert_TK: Tensor, firsts: Sequence[int]) -> Tensor:
    return weight_TK.new_empty(weight_TK.shape[0], tables[0].shape[1])


@table_grad.register_fake
def _(
    weight_TK: Tensor, x_TD: Tensor, expert_TK: Tensor, firsts: Sequence[int], sizes: Sequence[int]
) -> list[Tensor]:
    return [x_TD.new_empty(size, x_TD.shape[1]) for size in sizes]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    left, tables, expert_TK, ctx.firsts = inputs
    ctx.save_for_backward(left, expert_TK, *tables)


_Gradients = tuple[Tensor | None, list[Tensor | None], None, None]


def _dot_backward(ctx: Any, grad_TK: Tensor) -> _Gradients:
    x_TD, expert_TK, *tables = ctx.saved_tensors
    grad_TK, grad_x_TD = grad_TK.contiguous(), None
    if ctx.needs_input_grad[0]:
        grad_x_TD = table_sum(grad_TK, tables, expert_TK, ctx.firsts)
    return grad_x_TD, _grads_of_learning(ctx, grad_TK, x_TD, expert_TK, tables), None, None


def _sum_backward(ctx: Any, grad_TD: Tensor) -> _Gradients:
    weight_TK, expert_TK, *tables = ctx.saved_tensors
    grad_TD, grad_weight_TK = grad_TD.contiguous(), None
    if ctx.needs_input_grad[0]:
        grad_weight_TK = table_dot(grad_TD, tables, expert_TK, ctx.firsts)
    return grad_weight_TK, _grads_of_learning(ctx, weight_TK, grad_TD, expert_TK, tables), None, None


def _grads_of_learning(
    ctx: Any, weight_TK: Tensor, x_TD: Tensor, expert_TK: Tensor, tables: Sequence[Tensor]
) -> list[Tensor | None]:
    """The gradient of every table that learns; None, and no work, for a frozen one."""
    learning = [c for c, learns in enumerate(ctx.needs_input_grad[1]) if learns]
    grads: list[Tensor | None] = [None] * len(tables)
    if learning:
        firsts, sizes = [ctx.firsts[c] for c in learning], [tables[c].shape[0] for c in learning]
        found = table_grad(weight_TK, x_TD, expert_TK, firsts, sizes)
        for c, grad_nD in zip(learning, found, strict=True):
            grads[c] = grad_nD
    return grads


table_dot.register_autograd(_dot_backward, setup_context=_keep)
table_sum.register_autograd(_sum_backward, setup_context=_keep)
