"""Experts with stacked weights, in cohorts, computed without a loop over experts.

Legend: T tokens, D width, H hidden width, n experts of one cohort, N experts of the layer, P routed pairs,
M pairs that are kept and computed (M <= P), n1 = n + 1; z no-op experts of one cohort.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from cl_moe.layers.activity import Activity, joined, of_experts
from cl_moe.layers.exchange import Exchange
from cl_moe.layers.grouped import grouped_linear, grouped_relu_ffn
from cl_moe.layers.pairs import Pairs, pair_gather, pair_sum
from cl_moe.layers.precision import activation_by_name, in_place, matmul_dtype, no_autocast, wide
from cl_moe.layers.reuse import Reused
from cl_moe.layers.routing import Routing
from cl_moe.layers.static_pool import static_pool


class Cohort(nn.Module):
    """Feed-forward experts born together: stacked weights, and the rows of the router that choose them.

    An expert starts as the dense layer it replaces would: U(+-1/sqrt(fan_in)), like ``nn.Linear``. The router
    keys start at 0; a router initialises them (``Router.init_keys``). With loss-free balancing there is a
    buffer ``selection_bias`` (n + z,), born at 0, moved by ``ExpertLayer.after_step``, stopped with the
    weights. A gated expert (2002.05202, equation 6) computes (act(x w_in) * (x w_up)) w_out.

    Args:
        dim: D, width of input and output.
        num_experts: n that compute.
        hidden: H, width between an expert's input and its output; None: an expert is one linear map.
        activation: ``"relu"``, ``"gelu"``, ``"gelu_tanh"`` or ``"silu"``; of no use to one linear map.
        bias: whether the maps have biases.
        dropout: of the hidden neurons while training (2101.03961, section 2.4: "expert dropout"), in [0, 1).
        biased: whether there is a ``selection_bias``.
        glu: whether they are gated.
        num_noops: z experts behind those that compute: a key each, no weights.

    Attributes:
        num_experts: n + z, all that a router can choose: the first n ids compute.
        num_computing: n.
        num_noops: z.
        exchange: where ranks own experts (``spread``), the way to them; None: all are here.
    """

    router_parts = ("key", "selection_bias")
    exchange: Exchange | None = None
    selection_bias: Tensor | None

    def __init__(
        self,
        dim: int,
        num_experts: int,
        hidden: int | None,
        activation: str = "relu",
        bias: bool = True,
        dropout: float = 0.0,
        biased: bool = False,
        glu: bool = False,
        num_noops: int = 0,
    ) -> None:
        super().__init__()
        self.num_computing, self.num_noops = num_experts, num_noops
        self.num_experts, self.hidden, self.dropout = num_experts + num_noops, hidden, dropout
        self.activation = activation_by_name(activation)
        self.statistics_frozen = False
        self._memory = {name: Reused() for name in ("w_in", "w_up", "w_out")}
        inner = dim if hidden is None else hidden
        self.w_in = uniform((num_experts, dim, inner), fan_in=dim)
        self.b_in = uniform((num_experts, inner), fan_in=dim) if bias else None
        self.w_up = uniform((num_experts, dim, inner), fan_in=dim) if glu else None
        self.b_up = uniform((num_experts, inner), fan_in=dim) if glu and bias else None
        self.w_out = None if hidden is None else uniform((num_experts, hidden, dim), fan_in=hidden)
        self.b_out = uniform((num_experts, dim), fan_in=inner) if bias and hidden is not None else None
        self.key = nn.Parameter(torch.zeros(self.num_experts, dim))
        self.register_buffer("selection_bias", torch.zeros(self.num_experts) if biased else None)

    def freeze_statistics(self) -> None:
        """Never move the selection bias again, and give back where gradients stood."""
        self.statistics_frozen = True
        for memory in self._memory.values():
            memory.release()

    def forward(self, x_MD: Tensor, start_n1: Tensor) -> Tensor:
        """(M, D): the experts' outputs for rows sorted by expert.

        Args:
            x_MD: (M, D) rows, those of expert e at ``start_n1[e] : start_n1[e + 1]``.
            start_n1: (n + 1,) int64, from 0 to M.
        """
        if self.w_out is None:
            return _linear(x_MD, self.w_in, self.b_in, start_n1, self._memory["w_in"])
        drops = self.dropout > 0 and self.training
        if self.activation is nn.functional.relu and self.w_up is None and not drops:
            return self._relu_ffn(x_MD, start_n1)
        hidden_MH = self.hidden_units(x_MD, start_n1)
        if drops:
            hidden_MH = nn.functional.dropout(hidden_MH, self.dropout)
        return _linear(hidden_MH, self.w_out, self.b_out, start_n1, self._memory["w_out"])

    @torch.no_grad()
    def silence(self) -> None:
        """Let the last map, and with it the output, be 0."""
        for part in (self.w_in, self.b_in) if self.w_out is None else (self.w_out, self.b_out):
            if part is not None:
                part.zero_()

    def hidden_units(self, x_MD: Tensor, start_n1: Tensor) -> Tensor:
        """(M, H): what the outer map reads, before dropout; not of experts that have one map."""
        hidden_MH: Tensor = in_place(self.activation)(
            _linear(x_MD, self.w_in, self.b_in, start_n1, self._memory["w_in"])
        )
        if self.w_up is None:
            return hidden_MH
        return hidden_MH * _linear(x_MD, self.w_up, self.b_up, start_n1, self._memory["w_up"])

    def _relu_ffn(self, x_MD: Tensor, start_n1: Tensor) -> Tensor:
        """``forward`` as one operation, where nothing but a ReLU stands between the maps."""
        assert self.w_out is not None
        dtype = matmul_dtype(self.w_in)
        b_in, b_out = (bias if bias is None else bias.to(dtype) for bias in (self.b_in, self.b_out))
        w_in, w_out = self.w_in.to(dtype), self.w_out.to(dtype)
        memories = self._memory["w_in"], self._memory["w_out"]
        return grouped_relu_ffn(x_MD.to(dtype), w_in, b_in, w_out, b_out, start_n1, memories)


class ExpertPool(nn.ModuleList):
    """All cohorts of a layer, oldest first, as an expert computation: ``(x, routing) -> out``.

    It is the list itself, so that a layer holding it as ``cohorts`` registers every parameter once, under the
    name ``cohorts.0.w_in``.

    Args:
        cohorts: the cohorts, oldest first; more are appended as they are born.
    """

    def __init__(self, cohorts: Sequence[nn.Module] = ()) -> None:
        super().__init__(cohorts)

    def forward(self, x_TD: Tensor, routing: Routing, cohorts: Sequence[int] | None = None) -> Tensor:
        """(T, D): for every token the sum of its kept experts' outputs times their weights; 0 without any.

        No-op experts add nothing, and nothing is computed for their pairs. The weighted sum runs in float32
        or wider, in the order of a token's pairs; the result has x's dtype.

        Args:
            x_TD: (T, D) floating.
            routing: pairs with ids in [0, N), of experts of ``cohorts`` only.
            cohorts: the cohorts in use, ascending; None for all. One that takes no pair still joins the
                graph, so that its gradients are zeros and ranks agree on who has some.
        """
        every: list[Cohort] = list(self)  # type: ignore[arg-type]
        sizes = [cohort.num_experts for cohort in every]
        routing = _without_noops(routing, every)
        chosen = list(range(len(self)) if cohorts is None else cohorts)
        firsts, used = [sum(sizes[:index]) for index in chosen], [every[index] for index in chosen]
        exchange = every[0].exchange
        if exchange is None and torch.compiler.is_compiling():
            return static_pool(x_TD, routing, used, firsts)
        if exchange is None:
            weight_M, slots, start_N1 = _places_by_expert(routing, sum(sizes))
            own = zip(firsts, used, strict=True)
            starts = [start_N1[first : first + cohort.num_computing + 1] for first, cohort in own]
            out_MD = _computed(used, pair_gather(x_TD, slots), starts)
        else:
            computing = [cohort.num_computing for cohort in used]
            routing = _by_owner(routing, exchange.order(computing, x_TD.device), firsts, computing)
            weight_M, slots, start_E1 = _places_by_expert(routing, sum(computing))
            rows_MD = pair_gather(x_TD, slots)
            out_MD = exchange.compute(rows_MD, start_E1.diff(), computing, partial(_computed, used))
        with no_autocast(x_TD):
            out_MD = wide(out_MD)
            out_TD = pair_sum(weight_M.to(out_MD.dtype), out_MD, slots)
        return out_TD.to(x_TD.dtype)

    def hidden_activity(self, x_TD: Tensor, routing: Routing) -> Activity:
        """Of every expert's hidden units over the tokens that it computed, oldest cohort first."""
        cohorts: list[Cohort] = list(self)  # type: ignore[arg-type]
        num_experts = sum(cohort.num_experts for cohort in cohorts)
        _, slots, start_N1 = _places_by_expert(_without_noops(routing, cohorts), num_experts)
        rows_MD, parts, first = pair_gather(x_TD, slots), list[Activity](), 0
        for cohort in cohorts:
            start_n1 = start_N1[first : first + cohort.num_computing + 1]
            rows_mD = rows_MD[start_n1[0] : start_n1[-1]]
            start_n1 = start_n1 - start_n1[0]
            parts.append(of_experts(cohort.hidden_units(rows_mD, start_n1), start_n1))
            first += cohort.num_experts
        return joined(parts)


def _computed(cohorts: Sequence[Cohort], rows_MD: Tensor, starts: Sequence[Tensor]) -> Tensor:
    """(M, D): the experts' outputs for rows sorted by cohort and expert; ``starts``: (n + 1,) for each."""
    # one split, not a slice each: the gradient is put together once
    counts = torch.stack([start_n1[-1] - start_n1[0] for start_n1 in starts]).tolist()
    parts = zip(cohorts, rows_MD.split(counts), starts, strict=True)
    outs = [cohort(rows_mD, start_n1 - start_n1[0]) for cohort, rows_mD, start_n1 in parts]
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def _by_owner(routing: Routing, place_E: Tensor, firsts: Sequence[int], sizes: Sequence[int]) -> Routing:
    """The routing with the places of experts among those in use (``Exchange.order``) for their ids."""
    place_N = place_E.new_zeros(routing.num_experts)  # of others there is no kept pair
    for first, size, place_n in zip(firsts, sizes, place_E.split(list(sizes)), strict=True):
        place_N[first : first + size] = place_n
    return routing._replace(expert=place_N[routing.expert])


def _without_noops(routing: Routing, cohorts: Sequence[Cohort]) -> Routing:
    """The routing as if pairs of no-op experts had been dropped."""
    kept, first = routing.kept, 0
    for cohort in cohorts:
        computing, last = first + cohort.num_computing, first + cohort.num_experts
        if cohort.num_noops:
            kept = kept & ((routing.expert < computing) | (routing.expert >= last))
        first = last
    return routing._replace(kept=kept)


def _places_by_expert(routing: Routing, num_experts: int) -> tuple[Tensor, Pairs, Tensor]:
    """Places for the kept pairs, sorted by expert.

    Returns (M,) weights in the order of tokens, the pairs token -> place, (N + 1,) each expert's first place.
    """
    token_P, expert_P, weight_P, kept_P = routing.pairs()
    kept_M = kept_P.nonzero().squeeze(-1)
    if routing.token is not None:
        kept_M = kept_M[token_P[kept_M].sort(stable=True).indices]
    token_M, expert_M = token_P[kept_M], expert_P[kept_M]
    sorted_M, order_M = expert_M.sort(stable=True)
    counter = torch.arange(max(kept_M.numel(), num_experts, routing.num_tokens) + 1, device=kept_M.device)
    place_M = torch.empty_like(order_M).scatter_(0, order_M, counter[: order_M.numel()])
    start_T1 = torch.searchsorted(token_M, counter[: routing.num_tokens + 1])
    start_N1 = torch.searchsorted(sorted_M, counter[: num_experts + 1])
    by_place = Pairs(counter[: order_M.numel() + 1], token_M[order_M], routing.num_tokens)
    slots = Pairs(start_T1, place_M, order_M.numel(), transpose=(by_place, order_M))
    return weight_P[kept_M], slots, start_N1


def _linear(x_MI: Tensor, w_nIO: Tensor, b_nO: Tensor | None, start_n1: Tensor, memory: Reused) -> Tensor:
    """(M, O): every row times its expert's matrix, plus its bias, in the dtype of matrix products."""
    dtype = matmul_dtype(w_nIO)
    bias = None if b_nO is None else b_nO.to(dtype)
    return grouped_linear(x_MI.to(dtype), w_nIO.to(dtype), bias, start_n1, memory)


def uniform(shape: tuple[int, ...], fan_in: int) -> nn.Parameter:
    """U(+-1/sqrt(fan_in)), like ``nn.Linear``."""
    bound = fan_in**-0.5
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
