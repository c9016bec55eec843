"""From logits to scores, choices and gating weights.

Legend: T tokens, K choices per token, C candidates.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from cl_moe.errors import InputError
from cl_moe.layers.checks import number
from cl_moe.layers.precision import wide
from cl_moe.layers.selection import top_k_first


class Scores:
    """How a token-choice router scores experts, and whether it balances them without a loss.

    Args:
        function: ``"softmax"`` over the experts; or ``"sigmoid"`` of each logit alone, so that experts do not
            compete for probability (DeepSeek-V3, 2412.19437, equation 15).
        bias_rate: u >= 0 of auxiliary-loss-free balancing (2408.15664, algorithm 1; theirs is 1e-3). Above 0
            every expert has a bias that is added to its score for the choice, never for the gate, and after
            each optimizer step ``bias += u sign(mean load - load)``. Best beside ``balance=0``.
        precision: ``"float32"`` or wider, whatever the experts compute in (2101.03961, section 2.4); or
            ``"bfloat16"``: tokens, keys, logits and softmax, as in that paper's unstable arm (table 2).
    """

    def __init__(
        self,
        function: Literal["softmax", "sigmoid"] = "softmax",
        bias_rate: float = 0.0,
        precision: Literal["float32", "bfloat16"] = "float32",
    ) -> None:
        if function not in ("softmax", "sigmoid"):
            raise InputError(
                got=f"function={function}", allowed="softmax or sigmoid", key="router.scores.function"
            )
        number("bias_rate", bias_rate, key="router.scores.bias_rate")
        if precision not in ("float32", "bfloat16"):
            raise InputError(
                got=f"precision={precision}", allowed="float32 or bfloat16", key="router.scores.precision"
            )
        self.function, self.bias_rate, self.precision = function, bias_rate, precision

    def cast(self, x_TD: Tensor) -> Tensor:
        """(T, D) tokens in the precision that the router computes in."""
        return x_TD.bfloat16() if self.precision == "bfloat16" else wide(x_TD)

    def log(self, logits_TC: Tensor) -> Tensor:
        """(T, C) logarithms of the scores, up to a constant: their softmax is each one's share of the sum."""
        return nn.functional.logsigmoid(logits_TC) if self.function == "sigmoid" else logits_TC

    def choose(self, logits_TC: Tensor, k: int, bias_C: Tensor | None) -> Tensor:
        """(T, K) int64: the k best, best first; among equals the oldest."""
        if bias_C is None:
            return top_k_first(logits_TC, k)  # scores rise with logits, which have fewer equals
        score_TC = logits_TC.sigmoid() if self.function == "sigmoid" else logits_TC.softmax(dim=-1)
        return top_k_first(score_TC + wide(bias_C), k)

    def gates(self, logits_TC: Tensor, choice_TK: Tensor, normalize: bool) -> Tensor:
        """(T, K) scores of the chosen; with ``normalize`` divided by their sum."""
        if normalize:
            return self.log(logits_TC.gather(1, choice_TK)).softmax(dim=-1)
        if self.function == "sigmoid":
            return logits_TC.gather(1, choice_TK).sigmoid()
        return logits_TC.softmax(dim=-1).gather(1, choice_TK)
