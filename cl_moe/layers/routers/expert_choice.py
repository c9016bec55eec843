"""Expert Choice: experts choose tokens.

Legend: T tokens, D width, C candidates, n experts of one cohort, G sequences of S tokens, R = G C queues,
K tokens that an expert takes at most of a sequence, P = R K pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cl_moe.errors import InputError
from cl_moe.layers.precision import wide
from cl_moe.layers.rounding import Rounding, whole_share, whole_shares
from cl_moe.layers.routers.base import (
    Candidates,
    Router,
    check_coefficients,
    router_logits,
    scores_for_life,
    uniform_keys,
)
from cl_moe.layers.routers.capacity import check_factor, check_rounding, no_slots, real_per_group
from cl_moe.layers.routing import Routing
from cl_moe.layers.selection import top_k_first
from cl_moe.layers.tokens import Tokens


class ExpertChoice(Router):
    """Each expert takes its best tokens of a sequence (2202.09368, section 3.2, equations 1 and 2).

    S = softmax of the logits over the experts in use; of a sequence of n real tokens each of e experts takes
    the ``n c / e`` with the highest S, and S is the gate. So every expert has the same load, no balance loss
    is needed, and a token may go to several experts or to none (its output is then 0). Ties go to the earlier
    token. A group is a sequence (the paper's is a batch). An input of single tokens, (T, D), has sequences of
    one: with ``rounding="ceil"`` every expert takes every token, and ``"floor"``, with which none would, is
    refused there unless c is the number of experts.

    Who takes a token depends on later tokens, so a causal language model refuses this router.

    Args:
        dim: D, or None for that of the layer.
        capacity_factor: c, experts per token on average, 0 < c <= experts in use.
        rounding: ``"ceil"`` or ``"floor"`` of ``n c / e``.
        z_loss: weight of the router z-loss, >= 0.
        allow_noncausal: let a causal language model use it although its past then hears of its future.
    """

    balance = 0.0

    def __init__(
        self,
        dim: int | None = None,
        capacity_factor: float = 2.0,
        rounding: Rounding = "ceil",
        z_loss: float = 0.0,
        allow_noncausal: bool = False,
    ) -> None:
        super().__init__()
        check_factor("capacity_factor", capacity_factor)
        check_rounding("rounding", rounding)
        check_coefficients(z_loss=z_loss)
        self.dim, self.capacity_factor, self.rounding, self.z_loss = dim, capacity_factor, rounding, z_loss
        self.causal = allow_noncausal

    def forward(self, tokens: Tokens, candidates: Candidates) -> Routing:
        """Flat pairs, (P,), sequence by sequence, expert by expert, best token first.

        Every queue has the K places that a full sequence fills; those that a shorter one leaves empty have
        ``kept`` and ``asked`` False.
        """
        logits_TC = router_logits(wide(tokens.x), candidates)
        num_tokens, num = logits_TC.shape
        self.check_num_experts(num)
        per_group = tokens.group_size
        score_TC = logits_TC.softmax(dim=-1)
        most = whole_share(per_group, self.capacity_factor, num, self.rounding)
        queue_RS = self._queues(score_TC, per_group)
        ranked_RS = queue_RS
        if tokens.valid is not None:
            real_T1 = tokens.valid.unsqueeze(-1)
            ranked_RS = self._queues(score_TC.masked_fill(~real_T1, float("-inf")), per_group)
        place_RK = top_k_first(ranked_RS, most)
        row_R = torch.arange(queue_RS.shape[0], device=logits_TC.device)
        group_R, expert_R = row_R // num, candidates.expert[row_R.remainder(num)]
        slots_G = whole_shares(real_per_group(tokens), self.capacity_factor, num, self.rounding)
        taken_RK = torch.arange(most, device=logits_TC.device) < slots_G[group_R].unsqueeze(-1)
        taken_P = taken_RK.reshape(-1)
        return Routing(
            expert=expert_R.unsqueeze(-1).expand_as(place_RK).reshape(-1),
            weight=queue_RS.gather(1, place_RK).reshape(-1).masked_fill(~taken_P, 0.0),
            kept=taken_P,
            num_tokens=num_tokens,
            num_experts=candidates.num_experts,
            token=(group_R.unsqueeze(-1) * per_group + place_RK).reshape(-1),
            valid=tokens.valid,
            scores=scores_for_life(logits_TC, candidates),
            losses=self.losses(
                logits_TC, logits_TC.new_empty(0, dtype=torch.int64), tokens.valid, candidates.live
            ),
            asked=taken_P,
        )

    @property
    def choices(self) -> float:
        """The capacity factor."""
        return float(self.capacity_factor)

    def init_keys(self, key_nD: Tensor) -> None:
        """U(+-1/sqrt(D)), like ``nn.Linear``."""
        uniform_keys(key_nD)

    def check_num_experts(self, num_experts: int) -> None:
        """At least c: an expert cannot take a token twice."""
        if num_experts < max(self.capacity_factor, 1):
            raise InputError(
                got=f"capacity_factor={self.capacity_factor} with {num_experts} experts in use",
                allowed=f"a number > 0, at most {num_experts}: an expert takes a token once",
                key="router.capacity_factor",
            )

    def check_length(self, length: int, num_experts: int) -> None:
        """An expert needs a token."""
        if whole_share(length, self.capacity_factor, num_experts, self.rounding) == 0:
            raise no_slots(
                f"router=expert_choice with rounding={self.rounding} and capacity_factor="
                f"{self.capacity_factor} for {num_experts} experts",
                length,
                "router.rounding (or router.capacity_factor, model)",
            )

    @staticmethod
    def _queues(score_TC: Tensor, per_group: int) -> Tensor:
        """(R, S): for every sequence and expert the scores of the sequence's tokens."""
        score_GSC = score_TC.reshape(score_TC.shape[0] // per_group, per_group, score_TC.shape[1])
        return score_GSC.transpose(1, 2).reshape(-1, per_group)
