"""How many tokens of a sequence an expert takes, and which of those that chose it.

Legend: T tokens, K choices per token, Q = K T choices in the order in which they queue, G sequences.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from cl_moe.errors import InputError
from cl_moe.layers.routing import Tokens

Rounding = Literal["ceil", "floor"]


class Capacity:
    """Slots of an expert: ``real tokens of the sequence / experts x factor``, rounded, or a minimum.

    The share is counted within a sequence (2101.03961, equation 3, has it of a batch), so that no score
    depends on what else is in a batch or on another rank.

    Args:
        factor: while training, > 0.
        eval_factor: in evaluation, > 0.
        min_slots: slots that an expert has at least, >= 0.
        rounding: ``"ceil"`` or ``"floor"``; libraries differ.
    """

    def __init__(
        self, factor: float = 1.25, eval_factor: float = 2.0, min_slots: int = 4, rounding: Rounding = "ceil"
    ) -> None:
        check_factor("capacity.factor", factor)
        check_factor("capacity.eval_factor", eval_factor)
        check_rounding("capacity.rounding", rounding)
        if min_slots < 0:
            raise InputError(
                got=f"min_slots={min_slots}", allowed="a number >= 0", key="router.capacity.min_slots"
            )
        self.factor, self.eval_factor = factor, eval_factor
        self.min_slots, self.rounding = min_slots, rounding

    def slots(self, real_G: Tensor, num_candidates: int, training: bool) -> Tensor:
        """(G,) int64 slots per expert, for sequences of so many real tokens."""
        factor = self.factor if training else self.eval_factor
        return rounded_share(real_G, factor, num_candidates, self.rounding).clamp_min(self.min_slots)

    def within(
        self, choice_TK: Tensor, sent_TK: Tensor, tokens: Tokens, num_candidates: int, training: bool
    ) -> Tensor:
        """(T, K) bool: choices whose place in their expert's queue is inside the sequence's capacity.

        All first choices queue in token order, then all second ones, and so on.

        Args:
            choice_TK: (T, K) int64 in [0, num_candidates).
            sent_TK: (T, K) bool, False for what takes no slot: padding, and what was not sent.
            tokens: for their sequences and padding.
            num_candidates: experts that could be chosen.
            training: which factor.
        """
        num_tokens, k = choice_TK.shape
        sent_Q = sent_TK.t().reshape(-1)
        counter_Q = torch.arange(sent_Q.numel(), device=choice_TK.device)
        group_Q = counter_Q.remainder(max(num_tokens, 1)) // tokens.group_size
        # what takes no slot queues behind an expert of its own
        expert_Q = torch.where(sent_Q, choice_TK.t().reshape(-1), num_candidates)
        sorted_Q, order_Q = (group_Q * (num_candidates + 1) + expert_Q).sort(stable=True)
        place_Q = counter_Q - torch.searchsorted(sorted_Q, sorted_Q)
        place_Q = torch.empty_like(place_Q).scatter_(0, order_Q, place_Q)
        slots_G = self.slots(real_per_group(tokens), num_candidates, training)
        return (sent_Q & (place_Q < slots_G[group_Q])).reshape(k, num_tokens).t()


def real_per_group(tokens: Tokens) -> Tensor:
    """(G,) int64: real tokens of each sequence."""
    groups = tokens.x.shape[0] // tokens.group_size
    if tokens.valid is None:
        return torch.full((groups,), tokens.group_size, device=tokens.x.device)
    return tokens.valid.reshape(groups, tokens.group_size).sum(dim=1)


def rounded_share(real_G: Tensor, factor: float, num_candidates: int, rounding: Rounding) -> Tensor:
    """(G,) int64: ``real x factor / candidates``, rounded."""
    share_G = (real_G.double() * factor / num_candidates).round(decimals=9)  # 11.000000000000002 is 11
    return (share_G.ceil() if rounding == "ceil" else share_G.floor()).long()


def check_factor(name: str, factor: float) -> None:
    """Refuse a factor that leaves no slots, or is no number."""
    if not 0 < factor < math.inf:
        raise InputError(got=f"{name.split('.')[-1]}={factor}", allowed="a number > 0", key=f"router.{name}")


def check_rounding(name: str, rounding: str) -> None:
    """Refuse other ways to round."""
    if rounding not in ("ceil", "floor"):
        raise InputError(got=f"rounding={rounding}", allowed="ceil or floor", key=f"router.{name}")
