"""Lifelong-MoE's regularisation (Chen et al. 2023, arXiv 2305.12281, output-level regularisation)."""

from __future__ import annotations

from torch import Tensor

from cl_moe.errors import InputError
from cl_moe.models.base import ContinualModel
from cl_moe.strategies.base import Setting, Step
from cl_moe.strategies.checks import check_beside, check_probabilities
from cl_moe.strategies.passes import learning
from cl_moe.strategies.teacher import DistillingStrategy, check_weight, squared_distance

TRUNKS = ("free", "frozen")


class LifelongMoE(DistillingStrategy):
    """Loss = task + lambda KL(M_old || M_new) on the new data, and optionally an L2 pull to the old values.

    The other half of the method, growing and freezing, is chosen by its own keys:
    ``growth=every_experience freeze=past_experts growth.init=copy``. M_old uses the old cohorts only, so the
    term also holds the newborn experts to what the old ones answered.

    Args:
        strength: lambda.
        temperature: of the distillation; the paper has 1.
        l2: weight of the squared distance to their old values of all parameters that existed and still learn:
            the trunk and what the router shares, under ``freeze=past_experts``; 0 for none.
        trunk: ``"free"``, it goes on learning, as in the paper; ``"frozen"``, after the first experience
            nothing learns outside expert layers and head.
    """

    takes_rows = True
    stops_learning = True

    def __init__(
        self, strength: float = 1.0, temperature: float = 1.0, l2: float = 0.0, trunk: str = "free"
    ) -> None:
        check_weight(strength, "strategy.lifelong_moe.strength")
        check_weight(temperature, "strategy.lifelong_moe.temperature", above=True)
        check_weight(l2, "strategy.lifelong_moe.l2")
        if trunk not in TRUNKS:
            key = "strategy.lifelong_moe.trunk"
            raise InputError(got=f"trunk={trunk}", allowed=", ".join(TRUNKS), key=key)
        super().__init__(strength, temperature)
        self.l2, self.trunk = l2, trunk

    def check(self, setting: Setting) -> None:
        """A teacher's answers are distributions; a trunk that stands still is not shaken either."""
        check_probabilities("lifelong_moe", setting.stream)
        if self.trunk == "frozen":
            check_beside("lifelong_moe", setting, ("shrink_perturb",), "moves the trunk that is frozen")

    def gradients(self, model: ContinualModel) -> None:
        """What has no gradient, no optimizer moves: neither by momentum nor by decay."""
        if self.trunk == "free" or not self.teacher:
            return
        kept = (model.head, *model.expert_layers.values())
        learns = {id(parameter) for part in kept for parameter in part.parameters()}
        for parameter in learning(model).values():
            if id(parameter) not in learns:
                parameter.grad = None

    def loss(self, step: Step) -> dict[str, Tensor]:
        """The distillation and, where asked for, the L2 term, from the second experience on."""
        term = self.distillation(step)
        if term is None:
            return {}
        terms = {"lifelong_moe": term}
        if self.l2:
            terms["lifelong_moe_l2"] = self.l2 * squared_distance(step.model, self.teacher.values)
        return terms
