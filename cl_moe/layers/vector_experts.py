"""Experts made of single vectors, summed cohort by cohort, without a loop over experts.

Legend: T tokens, D width, K choices per token, P pairs of one cohort, n experts of one cohort.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cl_moe.layers.activity import Activity, joined
from cl_moe.layers.key_cohort import KeyCohort
from cl_moe.layers.pair_ops import own_pairs, pairs_by_cohort, table_dot, table_sum
from cl_moe.layers.pairs import Pairs, pair_dot, pair_sum, regular_pairs
from cl_moe.layers.precision import wide
from cl_moe.layers.routing import Routing
from cl_moe.layers.tables import gradient_place

Dot = Callable[[str], Tensor]
Coefficients = Callable[[Dot, Tensor], Tensor]


class Part(NamedTuple):
    """One cohort's share of a regular choice.

    Args:
        cohort: its tables.
        first: the id of its first expert.
        columns: which of the K choices are all of this cohort; None: they have to be looked for.
    """

    cohort: KeyCohort
    first: int
    columns: slice | None


def expert_sum(x_TD: Tensor, routing: Routing, parts: Sequence[Part], coefficients: Coefficients) -> Tensor:
    """(T, D): for every token the sum over its choices of coefficient x ``v`` of the expert.

    Args:
        x_TD: (T, D) float32 or float64.
        routing: a regular choice, of experts of ``parts`` only.
        parts: the cohorts in use, oldest first.
        coefficients: given ``dot``, where ``dot("u")`` is u . x of every choice, and the gating weights,
            returns what each choice multiplies its ``v`` by.
    """
    if torch.compiler.is_compiling():
        return _compiled_sum(x_TD, routing, parts, coefficients)
    if any(part.columns is None for part in parts):
        outs = _mixed_sums(x_TD, routing, parts, coefficients)
    else:
        outs = [_part_sum(x_TD, routing, part, coefficients) for part in parts]
    if len(outs) == 1:
        return outs[0]
    out_TD = torch.zeros_like(x_TD)
    for part_TD in outs:
        out_TD = out_TD + part_TD
    return out_TD


def expert_activity(
    x_TD: Tensor, routing: Routing, parts: Sequence[Part], coefficients: Coefficients
) -> Activity:
    """Of the one hidden unit that each expert is, over the tokens whose choice it was, once per choice.

    Args:
        x_TD: (T, D) float32 or float64.
        routing: a regular choice, of experts of ``parts`` only; padding is not ``kept``.
        parts: all cohorts, oldest first.
        coefficients: as for ``expert_sum``; with weights of 1 they are the hidden unit itself.
    """
    kept, found = routing._replace(weight=routing.kept.to(x_TD.dtype)), []
    for part in parts:
        pairs, kept_P = _pairs_of(part, kept)

        def dot(name: str, part: Part = part, pairs: Pairs = pairs) -> Tensor:
            return pair_dot(x_TD, wide(getattr(part.cohort, name)), pairs)

        size_P = coefficients(dot, torch.ones_like(kept_P)).abs().double()
        size_P = size_P.masked_fill(kept_P == 0, 0.0)  # padding may hold anything, even NaN
        n = part.cohort.num_experts
        total_n = torch.bincount(pairs.column_P, weights=size_P, minlength=n)
        reached_n = torch.bincount(pairs.column_P, weights=kept_P, minlength=n)
        found.append(Activity(total_n.double(), reached_n.long()))
    return joined(found)


def _mixed_sums(
    x_TD: Tensor, routing: Routing, parts: Sequence[Part], coefficients: Coefficients
) -> list[Tensor]:
    """(T, D) of every cohort, where each choice may be of any: what is the same for all is done at once."""
    firsts, sizes = [part.first for part in parts], [part.cohort.num_experts for part in parts]
    at_P, pairs = pairs_by_cohort(routing.expert, firsts, sizes)
    read = [_read(part.cohort, own) for part, own in zip(parts, pairs, strict=True)]

    def dot(name: str) -> Tensor:
        return torch.cat([pair_dot(x_TD, table(name), own) for table, own in read])

    coefficient_P = coefficients(dot, routing.weight.reshape(-1).index_select(0, at_P))
    own_P = coefficient_P.split([own.column_P.numel() for own in pairs])
    return [pair_sum(part_P, table("v"), own) for part_P, (table, own) in zip(own_P, read, strict=True)]


def _part_sum(x_TD: Tensor, routing: Routing, part: Part, coefficients: Coefficients) -> Tensor:
    pairs, weight_P = _pairs_of(part, routing)
    table, pairs = _read(part.cohort, pairs)

    def dot(name: str) -> Tensor:
        return pair_dot(x_TD, table(name), pairs)

    return pair_sum(coefficients(dot, weight_P), table("v"), pairs)


def _read(cohort: KeyCohort, pairs: Pairs) -> tuple[Callable[[str], Tensor], Pairs]:
    """A cohort's tables by name; where ranks own rows, those that are read, and tokens' pairs with these."""
    if (exchange := cohort.exchange) is None:
        return lambda name: wide(getattr(cohort, name)), pairs
    row_U, place_P = pairs.column_P.unique(return_inverse=True)
    asked = exchange.ask(row_U, cohort.num_experts)
    most = int(pairs.start_R1.diff().max()) if pairs.num_rows else 0

    def read(name: str) -> Tensor:
        own = getattr(cohort, name)
        return wide(asked.rows(own, gradient_place(own).by_rows))

    return read, Pairs(pairs.start_R1, place_P, row_U.numel(), max_per_row=most)


def _pairs_of(part: Part, routing: Routing) -> tuple[Pairs, Tensor]:
    num_experts = part.cohort.num_experts
    if part.columns is None:
        at_P, pairs = own_pairs(routing.expert, part.first, num_experts)
        return pairs, routing.weight.reshape(-1).index_select(0, at_P)
    pairs = regular_pairs(routing.expert[:, part.columns] - part.first, num_experts)
    return pairs, routing.weight[:, part.columns].reshape(-1)


def _compiled_sum(
    x_TD: Tensor, routing: Routing, parts: Sequence[Part], coefficients: Coefficients
) -> Tensor:
    firsts = [part.first for part in parts]

    def tables(name: str) -> list[Tensor]:
        return [wide(getattr(part.cohort, name)) for part in parts]

    def dot(name: str) -> Tensor:
        return table_dot(x_TD, tables(name), routing.expert, firsts)

    return table_sum(coefficients(dot, routing.weight), tables("v"), routing.expert, firsts)
