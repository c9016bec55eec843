"""A mixture of feed-forward experts: a router chooses, an expert pool computes.

Legend: D width, n experts of one cohort, N experts of the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cl_moe.layers.experts import Cohort, ExpertPool
from cl_moe.layers.routers import Candidates, Router, TopK
from cl_moe.layers.routing import ExpertLayer, Routing, flat_tokens, most_used, noisy_copy


class MoE(ExpertLayer):
    """Experts with a hidden layer each, chosen per token by a router (1701.06538; 2101.03961).

    Args:
        dim: D, width of input and output.
        num_experts: experts at the start, >= 1.
        hidden: an expert's hidden width.
        router: a router, or what makes one when called with ``dim=``.
        activation: ``"relu"`` or ``"gelu"``.
        bias: whether the experts' linear maps have biases.

    Raises:
        InputError: the router cannot serve so few experts (key ``router.k``).
    """

    cohorts: ExpertPool

    def __init__(
        self,
        dim: int,
        num_experts: int = 8,
        hidden: int = 64,
        router: Router | Callable[..., Router] = TopK,
        activation: str = "relu",
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.dim, self.hidden, self.activation, self.bias = dim, hidden, activation, bias
        self.router = router if isinstance(router, Router) else router(dim=dim)
        self.router.check_num_experts(num_experts)
        self.cohorts = ExpertPool([self._newborn(num_experts)])

    def forward(
        self, x: Tensor, mask: Tensor | None = None, cohorts: Sequence[int] | None = None
    ) -> tuple[Tensor, Routing]:
        """Output of the shape and dtype of ``x``, and what was routed.

        Args:
            x: (..., D) floating; everything before the last two dimensions numbers sequences.
            mask: (...) bool, False on padding; its output is 0 and it reaches no loss and no count.
            cohorts: use these cohorts only; None for all.
        """
        self.check_input(x, mask)
        chosen = self.check_cohorts(cohorts)
        tokens = flat_tokens(x, mask)
        routing = self.router(tokens, self._candidates(chosen))
        return self.cohorts(tokens.x, routing, chosen).reshape(x.shape), routing

    @torch.no_grad()
    def grow(
        self, num_experts: int, init: str = "fresh", noise: float = 0.01, load: Tensor | None = None
    ) -> None:
        """Append one cohort of newborn experts, drawn from torch's global generator; old bytes stay.

        Args:
            num_experts: how many are born.
            init: ``"fresh"``; ``"copy"`` of the most used experts and their keys (ties: the oldest; all of
                them in turn if more are born than live); ``"zero_output"``, whose down-projection is 0.
            noise: standard deviation of a copy's noise, relative to the copied tensor's own.
            load: (N,) load that ``"copy"`` ranks by; None: all equal.
        """
        self.check_growth(num_experts, init, load)
        newborn = self._newborn(num_experts).to(self._key(0))  # dtype and device of the old ones
        if init == "copy":
            source_n = most_used(load, self.num_experts, newborn.key.device)
            source_n = source_n[torch.arange(num_experts, device=source_n.device) % source_n.numel()]
            for name, parameter in newborn.named_parameters():
                old = torch.cat([cohort.get_parameter(name) for cohort in self.cohorts])
                parameter.copy_(noisy_copy(old[source_n], noise))
        elif init == "zero_output":
            newborn.w_out.zero_()
            if newborn.b_out is not None:
                newborn.b_out.zero_()
        self.cohorts.append(newborn)

    def _newborn(self, num_experts: int) -> Cohort:
        cohort = Cohort(self.dim, num_experts, self.hidden, self.activation, self.bias)
        with torch.no_grad():
            self.router.init_keys(cohort.key)
        return cohort

    def _key(self, cohort: int) -> Tensor:
        key = self.cohorts[cohort].key  # not get_parameter: a functional call puts plain tensors in its place
        assert isinstance(key, Tensor)
        return key

    def _candidates(self, chosen: Sequence[int]) -> Candidates:
        device = self._key(0).device
        sizes, frozen = self.cohort_sizes, self.frozen_cohorts
        expert_C = [torch.arange(sum(sizes[:c]), sum(sizes[: c + 1]), device=device) for c in chosen]
        live_C = [torch.full((sizes[c],), not frozen[c], device=device) for c in chosen]
        return Candidates(
            keys=[self._key(c) for c in chosen],
            expert=torch.cat(expert_C),
            live=torch.cat(live_C),
            num_experts=self.num_experts,
        )
