"""Learning without forgetting (Li & Hoiem 2016, arXiv 1606.09282, eq. 2-4)."""

from __future__ import annotations

from torch import Tensor

from cl_moe.strategies.base import Setting, Step
from cl_moe.strategies.checks import check_probabilities
from cl_moe.strategies.teacher import DistillingStrategy, check_weight


class LwF(DistillingStrategy):
    """Keeps the old model's answers on the new data.

    The term is ``alpha * T^2 * KL(teacher || student)`` at temperature T over the columns the teacher knows;
    T^2 keeps its gradient's size independent of T (Hinton et al. 2015).

    Args:
        alpha: strength.
        temperature: T.
    """

    def __init__(self, alpha: float = 1.0, temperature: float = 2.0) -> None:
        check_weight(alpha, "strategy.lwf.alpha")
        check_weight(temperature, "strategy.lwf.temperature", above=True)
        super().__init__(alpha, temperature)

    def check(self, setting: Setting) -> None:
        """A teacher's answers are distributions."""
        check_probabilities("lwf", setting.stream)

    def loss(self, step: Step) -> dict[str, Tensor]:
        """The distillation term, from the second experience on."""
        term = self.distillation(step)
        return {} if term is None else {"lwf": term}
