"""Gradients of retrieved scores, without the gradient of all scores.

A score is that of a crossing: the products of a query's two halves with one sub-key of each side, added.
Autograd of the products of all queries with all sub-keys multiplies as much again, twice, nearly all of it
zeros; here a query's gradient is a sum over the K crossings that it took, and a sub-key's one over the
queries that took it (``pairs.py``).

Legend: Q queries (one per token and head), S = 2 sides, H half of the key width, K retrieved, M sub-keys of
all sides, heads and cohorts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cl_moe.layers.key_cohort import KeyCohort
from cl_moe.layers.pairs import Pairs, pair_sum, regular_pairs
from cl_moe.layers.precision import wide
from cl_moe.layers.product_keys import Found, shell_coordinates


def with_gradient(
    found: Found, query_QSH: Tensor, cohorts: Sequence[KeyCohort], firsts: Sequence[int] | None, heads: int
) -> Found:
    """What was found, its scores differentiable with respect to the query and the cohorts' keys.

    Args:
        found: scores without a gradient, ids that count from 0 at the first cohort's first expert, or from
            where ``firsts`` says.
        query_QSH: (Q, 2, H), token by token, head by head.
        cohorts: those that ids may be of.
        firsts: the id of each cohort's first expert, ascending; None: the cohorts are shells of one grid.
        heads: h, of which each may have sub-keys of its own.
    """
    if not torch.is_grad_enabled():
        return found
    keys = [wide(cohort.keys) for cohort in cohorts]
    table_MH = torch.cat([key.reshape(-1, key.shape[-1]) for key in keys])
    at_QSK = _places(found.expert, cohorts, firsts, heads)
    frozen_M = None
    if not all(key.requires_grad for key in keys):
        lengths = torch.tensor([key.numel() // key.shape[-1] for key in keys], device=table_MH.device)
        frozen_M = torch.tensor([not key.requires_grad for key in keys], device=table_MH.device)
        frozen_M = frozen_M.repeat_interleave(lengths, output_size=table_MH.shape[0])
    return Found(_Score.apply(query_QSH, table_MH, found.score, at_QSK, frozen_M), found.expert)


def _places(
    expert_QK: Tensor, cohorts: Sequence[KeyCohort], firsts: Sequence[int] | None, heads: int
) -> Tensor:
    """(Q, 2, K): where the two sub-keys of each expert stand in the table of all sub-keys."""
    device = expert_QK.device
    lengths = torch.tensor([len(cohort.rows) for cohort in cohorts], device=device)
    sets = heads if cohorts[0].keys.dim() == 4 else 1
    offsets = 2 * sets * (lengths.cumsum(0) - lengths)
    if firsts is None:  # which shells a row or column is of is a question for each side
        starts = torch.tensor([cohort.rows.start for cohort in cohorts], device=device)
        at_QSK = torch.stack(shell_coordinates(expert_QK), dim=1)
        own_QSK = _group(at_QSK, starts)
        at_QSK -= starts[own_QSK]
    else:
        starts = torch.tensor(firsts, device=device)
        own_QK = _group(expert_QK, starts)
        at_QSK = torch.stack(shell_coordinates(expert_QK - starts[own_QK]), dim=1)
        own_QSK = own_QK.unsqueeze(1)
    length_QSK = lengths[own_QSK]
    at_QSK += offsets[own_QSK]
    at_QSK[:, 1] += length_QSK[:, -1]  # a set is its sub-keys of the one side, then those of the other
    if sets > 1:
        head_Q = torch.arange(expert_QK.shape[0], device=device) % heads
        at_QSK += 2 * length_QSK * head_Q[:, None, None]
    return at_QSK


def _group(value: Tensor, starts: Tensor) -> Tensor:
    """Which of the groups that begin at ``starts`` each value is in."""
    if starts.numel() == 1:
        return value.new_zeros([1] * value.dim())  # for all of them
    return torch.bucketize(value, starts[1:], right=True)


class _Score(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query_QSH: Tensor,
        table_MH: Tensor,
        score_QK: Tensor,
        at_QSK: Tensor,
        frozen_M: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(query_QSH, table_MH, at_QSK, frozen_M)
        return score_QK.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_QK: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        query_QSH, table_MH, at_QSK, frozen_M = ctx.saved_tensors
        pairs = regular_pairs(at_QSK.reshape(-1, at_QSK.shape[-1]), table_MH.shape[0])
        grad_P = grad_QK.unsqueeze(1).expand_as(at_QSK).reshape(-1)
        grad_query = grad_table = None
        if ctx.needs_input_grad[0]:
            grad_query = pair_sum(grad_P, table_MH, pairs).reshape(query_QSH.shape)
        if ctx.needs_input_grad[1]:
            by_key, order_P = pairs.transpose() if frozen_M is None else _of_learning(pairs, frozen_M)
            grad_table = pair_sum(
                grad_P.index_select(0, order_P), query_QSH.reshape(-1, query_QSH.shape[-1]), by_key
            )
        return grad_query, grad_table, None, None, None


def _of_learning(pairs: Pairs, frozen_M: Tensor) -> tuple[Pairs, Tensor]:
    """``pairs.transpose()`` without those of frozen sub-keys, which get no gradient."""
    at_P = (~frozen_M[pairs.column_P]).nonzero().squeeze(-1)
    key_P, order_P = pairs.column_P[at_P].sort(stable=True)
    order_P = at_P[order_P]
    start_M1 = torch.searchsorted(key_P, torch.arange(pairs.num_columns + 1, device=key_P.device))
    return Pairs(start_M1, pairs.rows().index_select(0, order_P), pairs.num_rows), order_P
