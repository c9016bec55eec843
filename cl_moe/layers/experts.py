"""Experts with stacked weights, in cohorts, computed without a loop over experts.

Legend: T tokens, D width, H hidden width, n experts of one cohort, N experts of the layer, P routed pairs,
M pairs that are kept (M <= P), n1 = n + 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cl_moe.layers.pairs import Pairs, pair_gather, pair_sum
from cl_moe.layers.precision import activation_by_name, matmul_dtype, no_autocast, wide
from cl_moe.layers.routing import Routing


class Cohort(nn.Module):
    """Feed-forward experts born together: stacked weights, and the rows of the router that choose them.

    An expert starts as the dense layer it replaces would: U(+-1/sqrt(fan_in)), like ``nn.Linear``. The router
    keys start at 0; a router initialises them (``Router.init_keys``).

    Args:
        dim: D, width of input and output.
        num_experts: n.
        hidden: H, width between an expert's two linear maps.
        activation: ``"relu"`` or ``"gelu"``.
        bias: whether the two maps have biases.
    """

    def __init__(
        self, dim: int, num_experts: int, hidden: int, activation: str = "relu", bias: bool = True
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.activation = activation_by_name(activation)
        self.w_in = _uniform((num_experts, dim, hidden), fan_in=dim)
        self.b_in = _uniform((num_experts, hidden), fan_in=dim) if bias else None
        self.w_out = _uniform((num_experts, hidden, dim), fan_in=hidden)
        self.b_out = _uniform((num_experts, dim), fan_in=hidden) if bias else None
        self.key = nn.Parameter(torch.zeros(num_experts, dim))

    def forward(self, x_MD: Tensor, start_n1: Tensor) -> Tensor:
        """(M, D): the experts' outputs for rows sorted by expert.

        Args:
            x_MD: (M, D) rows, those of expert e at ``start_n1[e] : start_n1[e + 1]``.
            start_n1: (n + 1,) int64, from 0 to M.
        """
        hidden_MH = self.activation(_grouped_linear(x_MD, self.w_in, self.b_in, start_n1))
        return _grouped_linear(hidden_MH, self.w_out, self.b_out, start_n1)


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

        The weighted sum runs in float32 or wider, in the order of a token's pairs; the result has x's dtype.

        Args:
            x_TD: (T, D) floating.
            routing: pairs with ids in [0, N), of experts of ``cohorts`` only.
            cohorts: the cohorts in use, ascending; None for all. One that takes no pair still joins the
                graph, so that its gradients are zeros and ranks agree on who has some.
        """
        sizes = [int(cohort.num_experts) for cohort in self]  # type: ignore[arg-type]
        weight_M, slots, start_N1 = _places_by_expert(routing, sum(sizes))
        rows_MD = pair_gather(x_TD, slots)
        bounds, outs = start_N1.tolist(), []
        for index in range(len(self)) if cohorts is None else cohorts:
            first = sum(sizes[:index])
            last = first + sizes[index]
            start_n1 = start_N1[first : last + 1] - bounds[first]
            outs.append(self[index](rows_MD[bounds[first] : bounds[last]], start_n1))
        with no_autocast(x_TD):
            out_MD = wide(torch.cat(outs))
            out_TD = pair_sum(weight_M.to(out_MD.dtype), out_MD, slots)
        return out_TD.to(x_TD.dtype)


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


def _grouped_linear(x_MI: Tensor, w_nIO: Tensor, b_nO: Tensor | None, start_n1: Tensor) -> Tensor:
    """(M, O): every row times its expert's matrix, plus its bias."""
    dtype = matmul_dtype(w_nIO)
    x_MI, w_nIO = x_MI.to(dtype), w_nIO.to(dtype)
    if x_MI.shape[0] == 0:
        num_experts = w_nIO.shape[0]  # a product of empty rows: it costs nothing and keeps the graph whole
        out_MO = torch.bmm(x_MI.expand(num_experts, 0, -1), w_nIO).reshape(0, w_nIO.shape[2])
    elif _grouped_mm_serves(w_nIO):
        out_MO = nn.functional.grouped_mm(x_MI, w_nIO, offs=start_n1[1:].int())
    else:
        out_MO = looped_mm(x_MI, w_nIO, start_n1)
    if b_nO is None:
        return out_MO
    places = Pairs(start_n1, torch.arange(x_MI.shape[0], device=x_MI.device), x_MI.shape[0])
    return out_MO + pair_gather(b_nO.to(dtype), places)


def _grouped_mm_serves(w_nIO: Tensor) -> bool:
    """``F.grouped_mm`` wants rows of whole 16 bytes, and no float64."""
    if w_nIO.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    return all(width * w_nIO.element_size() % 16 == 0 for width in w_nIO.shape[1:])


def looped_mm(x_MI: Tensor, w_nIO: Tensor, start_n1: Tensor) -> Tensor:
    """What ``F.grouped_mm`` computes, one expert after the other: for what it refuses, and for tests."""
    bounds = start_n1.tolist()
    return torch.cat([x_MI[bounds[e] : bounds[e + 1]] @ w_nIO[e] for e in range(w_nIO.shape[0])])


def _uniform(shape: tuple[int, ...], fan_in: int) -> nn.Parameter:
    bound = fan_in**-0.5
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
