"""How many tokens of a sequence an expert takes, and which of those that chose it.

Legend: T tokens, K choices per token, Q = K T choices in the order in which they queue, G sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cl_moe.errors import InputError
from cl_moe.layers.checks import number, whole
from cl_moe.layers.rounding import Rounding, whole_share, whole_shares
from cl_moe.layers.tokens import Tokens


class Capacity:
    """Slots of an expert: ``real tokens of the sequence / experts x factor``, rounded, or a minimum.

    The share is counted within a sequence (2101.03961, equation 3, has it of a batch), so that no score
    depends on what else is in a batch or on another rank. It is counted of the whole sequence, so that a
    prefix alone, which has fewer slots, may drop other tokens than the same prefix in a longer text. Among
    single tokens, (T, D), every sequence has one, and no capacity of a slot or more ever binds.

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
        whole("min_slots", min_slots, least=0, key="router.capacity.min_slots")
        self.factor, self.eval_factor = factor, eval_factor
        self.min_slots, self.rounding = min_slots, rounding

    def slots(self, real_G: Tensor, num_candidates: int, training: bool) -> Tensor:
        """(G,) int64 slots per expert, for sequences of so many real tokens."""
        factor = self.factor if training else self.eval_factor
        return whole_shares(real_G, factor, num_candidates, self.rounding).clamp_min(self.min_slots)

    def check_length(self, length: int, num_candidates: int, router: str) -> None:
        """Refuse sequences so short that no expert has a slot, while training or in evaluation."""
        factor = min(self.factor, self.eval_factor)
        if self.min_slots == 0 and whole_share(length, factor, num_candidates, self.rounding) == 0:
            raise no_slots(
                f"{router} with rounding={self.rounding}, a minimum of 0 and a factor of {factor} for "
                f"{num_candidates} experts",
                length,
                "router.rounding (or router.min_capacity, router.capacity.min_slots, model)",
            )

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


def no_slots(got: str, length: int, key: str) -> InputError:
    """What is said of a router that could not let any token of such sequences be computed."""
    what = "single tokens (model=mlp)" if length == 1 else f"sequences of {length} tokens"
    return InputError(
        got=f"{got}, on {what}: no expert ever has a slot",
        allowed="rounding=ceil, a minimum of a slot, or a model of sequences (patch_transformer, encoder)",
        key=key,
    )


def check_factor(name: str, factor: float) -> None:
    """Refuse a factor that leaves no slots, or is no number."""
    number(name.split(".")[-1], factor, key=f"router.{name}", above=True)


def check_rounding(name: str, rounding: str) -> None:
    """Refuse other ways to round."""
    if rounding not in ("ceil", "floor"):
        raise InputError(got=f"rounding={rounding}", allowed="ceil or floor", key=f"router.{name}")
