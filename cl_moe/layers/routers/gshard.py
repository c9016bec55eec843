"""GShard: two experts per token, with a capacity.

Legend: T tokens, D width, C candidates, n experts of one cohort; the 2 of a shape: first and second choice.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from cl_moe.errors import InputError
from cl_moe.layers.checks import number
from cl_moe.layers.routers.base import (
    Candidates,
    Router,
    check_coefficients,
    check_option,
    real_tokens,
    router_logits,
    token_choice,
    uniform_keys,
)
from cl_moe.layers.routers.capacity import Capacity
from cl_moe.layers.routers.scores import Scores
from cl_moe.layers.routing import Routing
from cl_moe.layers.tokens import Tokens

Second = Literal["sampled", "all", "none", "threshold"]


class GShard(Router):
    """Top-2 with a capacity (2006.16668, algorithm 1; variant: its published code).

    The gates of the two best experts are divided by their sum. All first choices of a sequence take slots
    before any second choice does; a choice that finds none is dropped and the other gate is not renormalised.
    The second expert of a token is asked only if ``second`` says so; what is not asked takes no slot and
    counts as no load. Ties go to the oldest expert. The balance loss looks at first choices and is
    ``N sum f P`` as in Switch (1 at uniform; GShard's differs by a constant).

    Whether a second choice finds a slot depends on the first choices of later tokens, so the router is causal
    with ``second="none"`` only.

    Args:
        dim: D, or None for that of the layer.
        second: ``"sampled"``: with probability ``min(1, g2 / threshold)`` while training, drawn from torch's
            global generator, and always in evaluation; ``"threshold"``: if g2 > threshold; ``"all"``:
            always; ``"none"``: never (g1 stays divided by the sum).
        threshold: of the second gate, > 0.
        balance: weight of the load balancing loss, >= 0; its value at uniform.
        z_loss: weight of the router z-loss, >= 0.
        capacity: None: 2 tokens / experts, at least 4, in training and evaluation.
        scores: softmax or sigmoid, and loss-free balancing; None: softmax without.
        allow_noncausal: let a causal language model use it although its past then hears of its future.
    """

    cost_varies = True  # what finds no slot is not computed

    def __init__(
        self,
        dim: int | None = None,
        second: Second = "sampled",
        threshold: float = 0.2,
        balance: float = 1e-2,
        z_loss: float = 0.0,
        capacity: Capacity | None = None,
        scores: Scores | None = None,
        allow_noncausal: bool = False,
    ) -> None:
        super().__init__()
        check_option("second", second, get_args(Second))
        number("threshold", threshold, key="router.threshold", above=True)
        check_coefficients(balance=balance, z_loss=z_loss)
        self.dim, self.second, self.threshold = dim, second, threshold
        self.balance, self.z_loss = balance, z_loss
        self.capacity = capacity or Capacity(factor=2.0, eval_factor=2.0)
        self.scores = scores or Scores()
        self.causal = second == "none" or allow_noncausal

    def forward(self, tokens: Tokens, candidates: Candidates) -> Routing:
        """Two pairs per token, (T, 2), best first; ``kept`` is False where one was not asked or dropped."""
        logits_TC = router_logits(self.scores.cast(tokens.x), candidates)
        self.check_num_experts(logits_TC.shape[1])
        choice_T2 = self.scores.choose(logits_TC, 2, candidates.bias)
        gate_T2 = self.scores.gates(logits_TC, choice_T2, normalize=True)
        asked_T2 = torch.stack([torch.ones_like(choice_T2[:, 0], dtype=torch.bool), self._second(gate_T2)], 1)
        sent_T2 = asked_T2 & real_tokens(tokens, choice_T2)
        kept_T2 = self.capacity.within(choice_T2, sent_T2, tokens, logits_TC.shape[1], self.training)
        losses = self.losses(logits_TC, choice_T2[:, :1], tokens.valid, candidates.live)
        routing = token_choice(tokens, candidates, logits_TC, choice_T2, gate_T2, kept_T2, losses)
        return routing._replace(asked=asked_T2)

    def _second(self, gate_T2: Tensor) -> Tensor:
        """(T,) bool: whether the second expert is asked."""
        second_T = gate_T2[:, 1].detach()
        if self.second == "sampled" and self.training:
            return torch.rand_like(second_T) * self.threshold < second_T
        if self.second == "threshold":
            return second_T > self.threshold
        return torch.full_like(second_T, self.second != "none", dtype=torch.bool)

    @property
    def choices(self) -> float:
        """Two."""
        return 2.0

    def init_keys(self, key_nD: Tensor) -> None:
        """U(+-1/sqrt(D)), like ``nn.Linear``."""
        uniform_keys(key_nD)

    def check_num_experts(self, num_experts: int) -> None:
        """At least two."""
        if num_experts < 2:
            raise InputError(
                got=f"router=gshard with {num_experts} expert in use",
                allowed="at least 2: it chooses two",
                key="layer.num_experts (or router)",
            )

    def check_length(self, length: int, num_experts: int) -> None:
        """An expert needs a slot."""
        self.capacity.check_length(length, num_experts, "router=gshard")
