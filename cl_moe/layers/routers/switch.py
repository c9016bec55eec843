"""Switch: one expert per token, with a capacity.

Legend: T tokens, D width, C candidates, n experts of one cohort.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cl_moe.errors import InputError
from cl_moe.layers.checks import number, whole
from cl_moe.layers.routers.base import (
    Candidates,
    Router,
    check_coefficients,
    check_k,
    real_tokens,
    router_logits,
    token_choice,
)
from cl_moe.layers.routers.capacity import Capacity, Rounding, check_factor, check_rounding
from cl_moe.layers.routers.scores import Scores
from cl_moe.layers.routing import Routing
from cl_moe.layers.tokens import Tokens


class Switch(Router):
    """The Switch Transformer's router: one expert per token, with a capacity (2101.03961, section 2).

    gate = softmax(W x)[argmax], float32, not renormalised. Each sequence gives every expert
    ``real tokens / experts x factor`` slots, taken in token order; a token that finds none is dropped: its
    output is 0. Ties go to the oldest expert. The capacity counts the tokens of the whole sequence, so what
    later tokens are reaches no earlier one, but how many there are may: a prefix alone may drop other tokens
    than the same prefix in a longer text.

    Args:
        dim: D, or None for that of the layer.
        balance: weight of the load balancing loss, >= 0 (equation 4); its value at uniform.
        z_loss: weight of the router z-loss, >= 0 (ST-MoE, 2202.08906).
        capacity_factor: while training, > 0.
        eval_capacity_factor: in evaluation, > 0.
        min_capacity: slots an expert has at least, >= 0.
        rounding: ``"ceil"`` or ``"floor"`` of the capacity; libraries differ.
        jitter: the router's input is multiplied by U(1 - jitter, 1 + jitter) while training; in [0, 1).
        init_scale: > 0; keys ~ truncated normal, standard deviation sqrt(init_scale / D) (section 2.4).
        scores: softmax scores or sigmoid ones (the gate is then the chosen's sigmoid), and loss-free
            balancing; None: as in the paper.
    """

    cost_varies = True  # what finds no slot is not computed

    def __init__(
        self,
        dim: int | None = None,
        balance: float = 1e-2,
        z_loss: float = 1e-3,
        capacity_factor: float = 1.25,
        eval_capacity_factor: float = 2.0,
        min_capacity: int = 4,
        rounding: Rounding = "ceil",
        jitter: float = 1e-2,
        init_scale: float = 0.1,
        scores: Scores | None = None,
    ) -> None:
        super().__init__()
        check_rounding("rounding", rounding)
        if not 0 <= jitter < 1:
            raise InputError(got=f"jitter={jitter}", allowed="0 <= jitter < 1", key="router.jitter")
        check_coefficients(balance=balance, z_loss=z_loss)
        whole("min_capacity", min_capacity, least=0, key="router.min_capacity")
        number("init_scale", init_scale, key="router.init_scale", above=True)
        check_factor("capacity_factor", capacity_factor)
        check_factor("eval_capacity_factor", eval_capacity_factor)
        self.dim, self.balance, self.z_loss = dim, balance, z_loss
        self.capacity = Capacity(capacity_factor, eval_capacity_factor, min_capacity, rounding)
        self.jitter, self.init_scale = jitter, init_scale
        self.scores = scores or Scores()

    def forward(self, tokens: Tokens, candidates: Candidates) -> Routing:
        """One pair per token, (T, 1); ``kept`` is False where the capacity was full."""
        x_TD = self.scores.cast(tokens.x)
        if self.training and self.jitter > 0:
            x_TD = x_TD * torch.empty_like(x_TD).uniform_(1 - self.jitter, 1 + self.jitter)
        logits_TC = router_logits(x_TD, candidates)
        choice_T1 = self.scores.choose(logits_TC, 1, candidates.bias)
        gate_T1 = self.scores.gates(logits_TC, choice_T1, normalize=False)
        real_T1 = real_tokens(tokens, choice_T1)
        kept_T1 = self.capacity.within(choice_T1, real_T1, tokens, logits_TC.shape[1], self.training)
        losses = self.losses(logits_TC, choice_T1, tokens.valid, candidates.live)
        return token_choice(tokens, candidates, logits_TC, choice_T1, gate_T1, kept_T1, losses)

    def init_keys(self, key_nD: Tensor) -> None:
        """Truncated normal, cut at two standard deviations."""
        std = (self.init_scale / key_nD.shape[1]) ** 0.5
        nn.init.trunc_normal_(key_nD, std=std, a=-2 * std, b=2 * std)

    def check_num_experts(self, num_experts: int) -> None:
        """One expert is enough."""
        check_k(1, num_experts)

    def check_length(self, length: int, num_experts: int) -> None:
        """An expert needs a slot."""
        self.capacity.check_length(length, num_experts, "router=switch")
