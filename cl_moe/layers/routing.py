"""What a router chose (law 6).

Legend: T tokens, K choices per token, P pairs (token, expert), N experts of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Routing(NamedTuple):
    """The record of what a router chose, returned beside a layer's output and stored nowhere.

    A regular choice (K experts for each token) keeps the shape (T, K); a ragged one is flat, (P,), and names
    its tokens in ``token``. ``pairs()`` gives the flat view of either.

    Args:
        expert: (T, K) or (P,) int64, ids for life in [0, num_experts).
        weight: same shape, gating weights as applied; 0 where ``kept`` is False.
        kept: same shape, bool; False where a capacity dropped the pair, it was not asked, or the token is
            padding.
        num_tokens: T, padding included.
        num_experts: N of the whole layer, whichever cohorts were asked for; 0 where nothing is routed.
        token: (P,) int64 row of each pair, or None for a regular choice.
        valid: (T,) bool, False on padding; None where there is none.
        scores: (T, N) raw logits of every expert, where that can be afforded; -inf for one not asked for.
        losses: named auxiliary losses, scalars, already weighted; to be added to the training loss.
        asked: same shape as ``expert``, bool; False where the router left a place of its regular shape empty
            (GShard's second expert, Expert Choice in a short sequence): no choice, no load, no drop. None
            where every place is a choice.
    """

    expert: Tensor
    weight: Tensor
    kept: Tensor
    num_tokens: int
    num_experts: int
    token: Tensor | None = None
    valid: Tensor | None = None
    scores: Tensor | None = None
    losses: Mapping[str, Tensor] = {}
    asked: Tensor | None = None

    def pairs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``token_P, expert_P, weight_P, kept_P``: the choice as a flat list of pairs."""
        if self.token is not None:
            return self.token, self.expert, self.weight, self.kept
        num_choices = self.expert.shape[1]
        token_T = torch.arange(self.num_tokens, device=self.expert.device)
        token_P = token_T.repeat_interleave(num_choices)
        return token_P, self.expert.reshape(-1), self.weight.reshape(-1), self.kept.reshape(-1)


class ExpertLoad(NamedTuple):
    """Loads of one layer, folded over batches; sums, so that folding and reducing over ranks is addition.

    Args:
        score: (N,) float64, gating weights of kept pairs summed per expert (FORMULAS 3's z, unnormalised).
        count: (N,) int64, slots routed to each expert, dropped ones included (c).
        kept: () int64, slots that were computed; drop rate = 1 - kept / count.sum().
    """

    score: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which nobody needs here
    kept: Tensor

    def merge(self, other: ExpertLoad) -> ExpertLoad:
        """Both loads together; an expert that one of them does not know yet counts as unused there."""
        size = max(self.score.numel(), other.score.numel())
        a, b = self.padded(size), other.padded(size)
        return ExpertLoad(a.score + b.score, a.count + b.count, a.kept + b.kept)

    def padded(self, num_experts: int) -> ExpertLoad:
        """The same load with zeros for experts born since."""
        missing = num_experts - self.score.numel()
        if missing == 0:
            return self
        pad = nn.functional.pad
        return ExpertLoad(pad(self.score, (0, missing)), pad(self.count, (0, missing)), self.kept)


def fold_load(routing: Routing) -> ExpertLoad:
    """The load of one batch; padding never counts, nor does what the router did not ask for."""
    token_P, expert_P, weight_P, kept_P = routing.pairs()
    counted_P = None if routing.valid is None else routing.valid[token_P]
    if routing.asked is not None:
        asked_P = routing.asked.reshape(-1)
        counted_P = asked_P if counted_P is None else counted_P & asked_P
    if counted_P is not None:
        expert_P, weight_P, kept_P = expert_P[counted_P], weight_P[counted_P], kept_P[counted_P]
    size = routing.num_experts
    score_N = torch.bincount(expert_P, weights=(weight_P * kept_P).detach().double(), minlength=size)
    return ExpertLoad(score_N.double(), torch.bincount(expert_P, minlength=size), kept_P.sum())
