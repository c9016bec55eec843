"""A mixture of feed-forward experts: a router chooses, an expert pool computes.

Legend: D width, n experts of one cohort, N experts of the layer, no-ops included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cl_moe.errors import InputError
from cl_moe.layers.activity import Activity, joined
from cl_moe.layers.checks import check_experts, whole
from cl_moe.layers.expert_layer import ExpertLayer, most_used, noisy_copy
from cl_moe.layers.experts import Cohort, ExpertPool
from cl_moe.layers.recycling import recycle
from cl_moe.layers.routers import Candidates, Router, TopK
from cl_moe.layers.routing import Routing
from cl_moe.layers.shared_experts import SharedExperts
from cl_moe.layers.tokens import flat_tokens


class MoE(ExpertLayer):
    """Experts with a hidden layer each, or none, chosen by a router (1701.06538; 2101.03961).

    Shared experts see every token, whichever cohorts are asked for. They are part of the trunk, not of a
    cohort nor of the router: ``freeze`` leaves them alone, and only a policy that stops everything
    (``all_past``) stops them.

    No-op experts make it the integrated mixture of depths and experts (MoDE, 2404.02258): they
    have keys and take part in the choice, its probabilities, losses and capacities like all others, but add
    nothing and compute nothing, so that with the residual around the layer a token passes by. Their ids
    follow those of the experts at the start, whose cohort is theirs: asked for, frozen and kept with it.
    Whatever counts experts or loads, from ``num_experts`` and ``Routing`` to the metrics, counts them too; a
    newborn is never a copy of one, nor one itself. Gates are not renormalised without them.

    Args:
        dim: D, width of input and output.
        num_experts: experts at the start that compute, >= 1.
        hidden: an expert's hidden width; a cohort born later may have another (``grow``). None: every expert
            is one linear map, as in the linear theory of continual mixtures (2406.16437).
        router: a router, or what makes one when called with ``dim=``.
        activation: ``"relu"``, ``"gelu"``, ``"gelu_tanh"`` or ``"silu"``.
        bias: whether the experts' linear maps have biases.
        num_shared: experts that every token passes, beside the router (DeepSeekMoE, 2401.06066); >= 0.
        dropout: of the experts' hidden neurons while training, in [0, 1); Switch fine-tunes with 0.4.
        glu: gated experts of three maps, act(W x) * (V x) between input and output (2002.05202, equation 6;
            with ``"silu"`` SwiGLU); the shared ones too.
        num_noops: no-op experts, >= 0.

    Raises:
        InputError: the router cannot serve so few experts (key ``router.k``), or a number is out of range.

    Attributes:
        num_experts: N, all that the router can choose: of every cohort, frozen ones and no-ops included.
    """

    router_parts = ("router",)
    cohorts: ExpertPool

    def __init__(
        self,
        dim: int,
        num_experts: int = 8,
        hidden: int | None = 64,
        router: Router | Callable[..., Router] = TopK,
        activation: str = "relu",
        bias: bool = True,
        num_shared: int = 0,
        dropout: float = 0.0,
        glu: bool = False,
        num_noops: int = 0,
    ) -> None:
        super().__init__()
        whole("dim", dim, least=1, key="dim")
        check_experts(num_experts, hidden, num_shared, dropout, glu, num_noops)
        self.dim, self.hidden, self.activation, self.bias = dim, hidden, activation, bias
        self.dropout, self.glu = dropout, glu
        self.router = router if isinstance(router, Router) else router(dim=dim)
        self.router.check_dim(dim)
        self.router.check_num_experts(num_experts + num_noops)
        self.cohorts = ExpertPool([self._newborn(num_experts, hidden, num_noops)])
        self.shared = None
        if num_shared and hidden is not None:
            self.shared = SharedExperts(dim, num_shared, hidden, activation, bias, dropout, glu)

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
        if x.dim() <= 2:
            self.check_length(1, sum(self.cohort_sizes[c] for c in chosen))
        tokens = flat_tokens(x, mask)
        routing = self.router(tokens, self._candidates(chosen))
        out_TD = self.cohorts(tokens.x, routing, chosen)
        if self.shared is not None:
            out_TD = out_TD + self.shared(tokens.x, tokens.valid)
        return out_TD.reshape(x.shape), routing

    def check_length(self, length: int, num_experts: int | None = None) -> None:
        """What the router says of sequences of so many tokens."""
        self.router.check_length(length, self.num_experts if num_experts is None else num_experts)

    @property
    def has_hidden_units(self) -> bool:
        """Every expert has, or none."""
        return self.hidden is not None

    def hidden_activity(self, x: Tensor, routing: Routing) -> Activity | None:
        """Of the experts' hidden units, expert by expert, then those of the shared experts; None without."""
        if self.hidden is None:
            return None
        x_TD = x.reshape(-1, self.dim)
        parts = [self.cohorts.hidden_activity(x_TD, routing)]
        if self.shared is not None:
            parts.append(self.shared.hidden_activity(x_TD, routing.valid))
        return joined(parts)

    def active_parameters(self) -> int:
        """All but the experts that are not chosen; all keys, which the router needs."""
        experts = sum(p.numel() for cohort in self._cohorts() for p in cohort.parameters())
        experts -= sum(cohort.key.numel() for cohort in self._cohorts())
        chosen = min(self.router.choices / self.num_experts, 1.0)
        return super().active_parameters() - experts + round(chosen * experts)

    @property
    def causal(self) -> bool:
        """The router's answer: experts themselves look at one token each."""
        return self.router.causal

    @torch.no_grad()
    def grow(
        self,
        num_experts: int,
        init: str = "fresh",
        noise: float = 0.01,
        load: Tensor | None = None,
        hidden: int | None = None,
    ) -> None:
        """Append one cohort of newborn experts, drawn from torch's global generator; old bytes stay.

        Args:
            num_experts: how many are born.
            init: ``"fresh"``; ``"copy"`` of the most used experts of the same hidden width, their keys and
                selection biases (ties: the oldest; all of them in turn if more are born than live; never of a
                no-op); ``"zero_output"``, whose down-projection is 0.
            noise: standard deviation of a copy's noise, relative to the copied tensor's own.
            load: (N,) load that ``"copy"`` ranks by; None: all equal.
            hidden: the newborns' hidden width; None: as at the start.

        Raises:
            InputError: also where no expert has the width that a copy is to have.
        """
        self.check_growth(num_experts, init, load, noise)
        if hidden is not None:
            self.check_hidden(hidden, init)
        hidden = self.hidden if hidden is None else hidden
        self.cohorts.append(self._born(num_experts, hidden, init, noise, load))

    def birth_parameters(self, num_experts: int, total: int, hidden: int | None = None) -> int:
        """Of experts and keys."""
        with torch.device("meta"):
            newborn = self._newborn(num_experts, self.hidden if hidden is None else hidden)
        return sum(parameter.numel() for parameter in newborn.parameters())

    def check_hidden(self, hidden: int, init: str) -> None:
        """Any width will do, but a copy needs experts of its own; experts of one map have none."""
        whole("hidden", hidden, least=1, key="growth.hidden")
        widths = sorted({cohort.hidden for cohort in self._cohorts() if cohort.hidden is not None})
        if not widths:
            raise InputError(
                got=f"hidden={hidden} beside experts of one linear map",
                allowed="growth.hidden=null, or layer.hidden",
                key="growth.hidden",
            )
        if init == "copy" and hidden not in widths:
            raise InputError(
                got=f"copies of hidden width {hidden} of experts of width {', '.join(map(str, widths))}",
                allowed="the width of experts that are there, or growth.init=fresh or zero_output",
                key="growth.hidden",
            )

    def recycle(
        self, experts: Sequence[int], init: str = "fresh", noise: float = 0.01, load: Tensor | None = None
    ) -> None:
        """Draw experts anew, with their keys and selection biases, under their old ids: see ``recycling``."""
        recycle(self, experts, init, noise, load)

    @property
    def wants_load(self) -> bool:
        """With loss-free balancing."""
        return self.router.scores.bias_rate > 0

    @torch.no_grad()
    def after_step(self, count_N: Tensor) -> None:
        """Move the selection biases: ``+= rate sign(mean load - load)`` (2408.15664, algorithm 1).

        Frozen cohorts keep theirs, and the mean is that of the live experts, so that those balance among
        themselves, whatever the frozen ones take.

        Args:
            count_N: (N,) choices of each expert in all batches of the step, summed over ranks.
        """
        if count_N.shape != (self.num_experts,):
            raise InputError(
                got=f"counts of shape {tuple(count_N.shape)}",
                allowed=f"shape ({self.num_experts},)",
                key="count_N",
            )
        frozen, counts = self.frozen_cohorts, count_N.double().split(list(self.cohort_sizes))
        live = [index for index, stopped in enumerate(frozen) if not stopped]
        if not self.wants_load or not live:
            return
        mean = torch.cat([counts[index] for index in live]).mean()
        for index in live:
            bias_n = self.cohorts[index].selection_bias
            assert isinstance(bias_n, Tensor)
            bias_n += (self.router.scores.bias_rate * (mean - counts[index]).sign()).to(bias_n)

    def _newborn(self, num_experts: int, hidden: int | None, num_noops: int = 0) -> Cohort:
        options = (self.activation, self.bias, self.dropout, self.wants_load, self.glu, num_noops)
        cohort = Cohort(self.dim, num_experts, hidden, *options)
        with torch.no_grad():
            self.router.init_keys(cohort.key)
        return cohort.train(self.training)

    def newborn_like(
        self, cohort: int, num_experts: int, init: str, noise: float, load: Tensor | None
    ) -> Cohort:
        """Experts as they would be born, of a cohort's width; they are no part of the layer."""
        return self._born(num_experts, self._cohorts()[cohort].hidden, init, noise, load)

    def _born(
        self, num_experts: int, hidden: int | None, init: str, noise: float, load: Tensor | None
    ) -> Cohort:
        born = self._newborn(num_experts, hidden).to(self._key(0))  # dtype and device of the old ones
        if init == "copy":
            self._copy_most_used(born, noise, load)
        elif init == "zero_output":
            born.silence()
        return born

    def _copy_most_used(self, newborn: Cohort, noise: float, load: Tensor | None) -> None:
        """Fill a newborn cohort from the most used experts of its width that compute."""
        sources = [cohort for cohort in self._cohorts() if cohort.hidden == newborn.hidden]
        fits_N = [
            cohort.hidden == newborn.hidden and place < cohort.num_computing
            for cohort in self._cohorts()
            for place in range(cohort.num_experts)
        ]
        load_n = None if load is None else load[torch.tensor(fits_N, device=load.device)]
        best_n = most_used(load_n, sum(fits_N), newborn.key.device)
        source_n = best_n[torch.arange(newborn.num_experts, device=best_n.device) % best_n.numel()]
        for name, parameter in newborn.named_parameters():
            # the rows of no-ops, of keys and biases alone, are the last
            old = torch.cat([cohort.get_parameter(name)[: cohort.num_computing] for cohort in sources])
            parameter.copy_(noisy_copy(old[source_n], noise))
        for name, buffer in newborn.named_buffers():
            olds = [cohort.get_buffer(name)[: cohort.num_computing] for cohort in sources]
            buffer.copy_(torch.cat(olds)[source_n])

    def _cohorts(self) -> list[Cohort]:
        return list(self.cohorts)  # type: ignore[arg-type]

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
            bias=self._selection_bias(chosen),
        )

    def _selection_bias(self, chosen: Sequence[int]) -> Tensor | None:
        cohorts = self._cohorts()
        biases = [cohorts[c].selection_bias for c in chosen if cohorts[c].selection_bias is not None]
        return torch.cat(biases) if biases else None  # type: ignore[arg-type]
