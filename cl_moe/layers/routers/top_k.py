"""Dropless top-k.

Legend: T tokens, D width, K choices per token, C candidates, n experts of one cohort, B sequences, S tokens
of each.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from cl_moe.layers.checks import whole
from cl_moe.layers.routers.base import (
    Candidates,
    Router,
    check_coefficients,
    check_k,
    check_option,
    real_tokens,
    router_logits,
    token_choice,
    uniform_keys,
)
from cl_moe.layers.routers.scores import Scores
from cl_moe.layers.routing import Routing
from cl_moe.layers.tokens import Tokens


class TopK(Router):
    """The k best experts of every token, none dropped (dropless top-k; 1701.06538, equations 3 to 5).

    Ties go to the oldest expert. With k = 1 and ``normalize="selected"`` every gate is 1, so that the task's
    loss does not reach the router: take ``"all"`` there.

    A whole sequence may be sent to the same experts (2110.03742, task-level routing by sentence; 2406.16437,
    by data set): the mean of its real tokens' logits is then the logit of each. That looks at later tokens.

    Args:
        dim: D, or None for that of the layer.
        k: experts per token, 1 <= k <= experts.
        normalize: gates sum to 1 over the ``"selected"`` k, or are the scores as they are over ``"all"``
            experts (softmax before the choice; a plain sigmoid with sigmoid scores).
        balance: weight of the load balancing loss, >= 0; its value at uniform.
        z_loss: weight of the router z-loss, >= 0.
        scores: softmax or sigmoid, and loss-free balancing; None: softmax without.
        level: who chooses: every ``"token"``, or every ``"sequence"`` as one.
    """

    def __init__(
        self,
        dim: int | None = None,
        k: int = 2,
        normalize: Literal["selected", "all"] = "selected",
        balance: float = 1e-2,
        z_loss: float = 0.0,
        scores: Scores | None = None,
        level: Literal["token", "sequence"] = "token",
    ) -> None:
        super().__init__()
        check_option("normalize", normalize, ("selected", "all"))
        check_option("level", level, ("token", "sequence"))
        check_coefficients(balance=balance, z_loss=z_loss)
        whole("k", k, least=1, key="router.k")
        self.dim, self.k, self.normalize = dim, k, normalize
        self.balance, self.z_loss = balance, z_loss
        self.scores = scores or Scores()
        self.level, self.causal = level, level == "token"

    def forward(self, tokens: Tokens, candidates: Candidates) -> Routing:
        """K pairs per token, (T, K), best first; ``kept`` is False on padding only."""
        logits_TC = router_logits(self.scores.cast(tokens.x), candidates)
        self.check_num_experts(logits_TC.shape[1])
        if self.level == "sequence":
            logits_TC = _of_sequences(logits_TC, tokens)
        choice_TK = self.scores.choose(logits_TC, self.k, candidates.bias)
        gate_TK = self.scores.gates(logits_TC, choice_TK, normalize=self.normalize == "selected")
        kept_TK = real_tokens(tokens, choice_TK)
        losses = self.losses(logits_TC, choice_TK, tokens.valid, candidates.live)
        return token_choice(tokens, candidates, logits_TC, choice_TK, gate_TK, kept_TK, losses)

    @property
    def choices(self) -> float:
        """k."""
        return float(self.k)

    def init_keys(self, key_nD: Tensor) -> None:
        """U(+-1/sqrt(D)), like ``nn.Linear``."""
        uniform_keys(key_nD)

    def check_num_experts(self, num_experts: int) -> None:
        """At least k."""
        check_k(self.k, num_experts)


def _of_sequences(logits_TC: Tensor, tokens: Tokens) -> Tensor:
    """(T, C): for every token the mean over the real tokens of its sequence; 0 where there is none."""
    logits_BSC = logits_TC.unflatten(0, (-1, tokens.group_size))
    if tokens.valid is None:
        mean_B1C = logits_BSC.mean(dim=1, keepdim=True)
    else:
        num_B1 = tokens.valid.view(-1, tokens.group_size).sum(dim=1, keepdim=True).clamp_min(1)
        mean_B1C = logits_BSC.sum(dim=1, keepdim=True) / num_B1.unsqueeze(
            2
        )  # padding is 0, so are its logits
    return mean_B1C.expand_as(logits_BSC).flatten(0, 1)
