"""Which experts a probe set goes to, taken from the routings of an evaluation as they pass by.

Legend: T tokens of a batch, R rows of it, S probe tokens, K choices per token, P pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cl_moe.layers.routing import Routing
from cl_moe.metrics.functional.routing import Choices

POSITIONS = 8
"""Tokens of one example that are looked at, evenly spread, where it has more: those of one text are alike,
and raw ids are large where a token has many experts."""


class ProbeChoices:
    """Choices of chosen rows of some test sets, batch by batch, in order.

    Args:
        rows: of each test set, the rows that are looked at, ascending, (R,) int64.
    """

    def __init__(self, rows: Sequence[Tensor]) -> None:
        self._rows = list(rows)
        self._passed = [0] * len(self._rows)
        self._found: list[dict[int, list[Choices]]] = [{} for _ in self._rows]

    def update(self, test_set: int, num_rows: int, routings: Mapping[int, Routing]) -> None:
        """Take up the next batch, of ``num_rows`` rows, of a test set; blocks at depth choose no experts."""
        first = self._passed[test_set]
        self._passed[test_set] += num_rows
        row_R = self._rows[test_set]
        row_R = row_R[(row_R >= first) & (row_R < first + num_rows)] - first
        if row_R.numel():
            for block, routing in routings.items():
                if block >= 0:
                    found = self._found[test_set].setdefault(block, [])
                    found.append(choices_of(routing, row_R, num_rows))

    def compute(self) -> list[dict[int, Choices]]:
        """Of each test set the choices by block, on the CPU."""
        return [{block: _joined(parts) for block, parts in found.items()} for found in self._found]


def choices_of(routing: Routing, row_R: Tensor, num_rows: int) -> Choices:
    """The sets of experts of some rows of a batch: kept pairs only, each expert once.

    Args:
        routing: of a batch in which every row has as many tokens, padding included.
        row_R: (R,) int64, which rows.
        num_rows: of the batch.
    """
    length, N = routing.num_tokens // num_rows, max(routing.num_experts, 1)
    position = torch.arange(0, length, -(-length // POSITIONS) or 1)
    token_S = (row_R.unsqueeze(1) * length + position).reshape(-1).to(routing.expert.device)
    S = token_S.numel()
    real_S = torch.ones_like(token_S, dtype=torch.bool)
    if routing.valid is not None:
        real_S = routing.valid[token_S]
    if routing.token is None:
        expert_P, kept_P = routing.expert[token_S].reshape(-1), routing.kept[token_S].reshape(-1)
        place_P = torch.arange(S, device=token_S.device).repeat_interleave(routing.expert.shape[1])
    else:
        place_T = torch.full((routing.num_tokens,), -1, device=token_S.device)
        place_T[token_S] = torch.arange(S, device=token_S.device)
        place_P, expert_P, kept_P = place_T[routing.token], routing.expert, routing.kept
        kept_P = kept_P & (place_P >= 0)
    place_P, expert_P = place_P[kept_P], expert_P[kept_P]
    seen_P = real_S[place_P]
    key_P = (place_P[seen_P] * N + expert_P[seen_P]).unique()
    size_S = torch.bincount(key_P // N, minlength=S)
    return Choices(key_P.remainder(N).int().cpu(), size_S.int().cpu(), int(real_S.sum()))


def _joined(parts: Sequence[Choices]) -> Choices:
    expert, size, real = zip(*parts, strict=True)
    return Choices(torch.cat(expert), torch.cat(size), sum(real))
