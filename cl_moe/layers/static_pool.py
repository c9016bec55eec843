"""The expert computation in shapes that do not depend on the routing, for ``torch.compile``.

The eager computation gathers only pairs that were kept and cuts the rows where cohorts meet, so its shapes
are known when it runs; compiled code would break off there. Here every pair is computed, a dropped one with
weight 0, and rows are as wide as the widest cohort: hidden units that a narrower one lacks are 0, and so is
what its products make of them (``opaque_grouped_mm``).
Pairs of no-op experts are sorted behind all others, where nothing is multiplied. It is compiled anew for each
growth and each new size of input: torch gives up after ``torch._dynamo.config.recompile_limit`` (8) of them.

Legend: T tokens, D width, H widest hidden width, n experts in use that compute, N experts of the layer,
P routed pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cl_moe.layers.grouped import opaque_grouped_mm
from cl_moe.layers.precision import matmul_dtype, no_autocast, wide
from cl_moe.layers.routing import Routing

if TYPE_CHECKING:
    from cl_moe.layers.experts import Cohort


def static_pool(x_TD: Tensor, routing: Routing, cohorts: Sequence[Cohort], first_id: Sequence[int]) -> Tensor:
    """What ``ExpertPool`` computes, to rounding.

    Args:
        x_TD: (T, D) floating.
        routing: of experts of ``cohorts`` only; no pair of a no-op is ``kept``.
        cohorts: those in use, oldest first.
        first_id: id of the first expert of each.
    """
    token_P, expert_P, weight_P, kept_P = routing.pairs()
    sorted_P, order_P = _rows(expert_P, routing.num_experts, cohorts, first_id).sort(stable=True)
    token_P = token_P.index_select(0, order_P)
    weight_P = torch.where(kept_P, weight_P, 0.0).index_select(0, order_P)
    boundary_n1 = torch.arange(sum(c.num_computing for c in cohorts) + 1, device=x_TD.device)
    start_n1 = torch.searchsorted(sorted_P, boundary_n1)
    dtype = matmul_dtype(cohorts[0].w_in)
    with no_autocast(x_TD):
        x_PD = x_TD.index_select(0, token_P).to(dtype)
        out_PD = _experts(x_PD, cohorts, sorted_P, start_n1)
        out_PD = wide(out_PD)
        out_PD = weight_P.to(out_PD.dtype).unsqueeze(-1) * out_PD
        out_TD = out_PD.new_zeros(x_TD.shape).index_add(0, token_P, out_PD)
    return out_TD.to(x_TD.dtype)


def _experts(x_PD: Tensor, cohorts: Sequence[Cohort], row_P: Tensor, start_n1: Tensor) -> Tensor:
    """(P, D) outputs for rows sorted by expert."""
    widest, dtype, one = max(c.w_in.shape[2] for c in cohorts), x_PD.dtype, cohorts[0]
    whole = not any(c.num_noops for c in cohorts)
    bias_row_P = row_P if whole else row_P.clamp_max(start_n1.shape[0] - 2)

    def first_map(name: str) -> Tensor:
        maps = [getattr(c, f"w_{name}").to(dtype) for c in cohorts]
        out_PH = opaque_grouped_mm(x_PD, maps, start_n1, whole)
        if one.b_in is None:
            return out_PH
        given = [getattr(c, f"b_{name}") for c in cohorts]
        biases = [nn.functional.pad(bias, (0, widest - bias.shape[1])) for bias in given]
        return out_PH + _rows_of(biases, bias_row_P).to(dtype)

    hidden_PH = first_map("in")
    if one.w_out is None:
        return hidden_PH
    hidden_PH = one.activation(hidden_PH)
    if one.w_up is not None:
        hidden_PH = hidden_PH * first_map("up")
    if one.dropout > 0:
        hidden_PH = nn.functional.dropout(hidden_PH, one.dropout, one.training)
    maps = [c.w_out.to(dtype) for c in cohorts if c.w_out is not None]
    out_PD = opaque_grouped_mm(hidden_PH, maps, start_n1, whole)
    if one.b_out is not None:
        biases: list[Tensor] = [c.b_out for c in cohorts if c.b_out is not None]
        out_PD = out_PD + _rows_of(biases, bias_row_P).to(dtype)
    return out_PD


def _rows_of(biases: Sequence[Tensor], row_P: Tensor) -> Tensor:
    """Rows of the stacked biases, in their own dtype: the gradient adds rows up, and not in bfloat16."""
    return torch.cat(list(biases)).index_select(0, row_P)


def _rows(expert_P: Tensor, num_experts: int, cohorts: Sequence[Cohort], first_id: Sequence[int]) -> Tensor:
    """(P,) int64: each pair's place in the stacked cohorts; n, behind them, for a no-op's."""
    sizes = [c.num_computing for c in cohorts]
    if sum(sizes) == num_experts:
        return expert_P
    ids = [torch.arange(f, f + size, device=expert_P.device) for f, size in zip(first_id, sizes, strict=True)]
    row_N = torch.full((num_experts,), sum(sizes), device=expert_P.device)
    row_N = row_N.index_copy(0, torch.cat(ids), torch.arange(sum(sizes), device=expert_P.device))
    return row_N[expert_P]
