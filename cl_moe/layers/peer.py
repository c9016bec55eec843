"""PEER: parameter-efficient expert retrieval from a large pool of tiny experts (2407.04153).

Legend: T tokens, D width, h heads, K = k retrieved experts per head, Q = T h queries, S = 2 sides of a key,
H half of the key width, m grid size, n = m^2 experts of one cohort, N experts of the layer, P pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn

from cl_moe.errors import InputError
from cl_moe.layers.batch_norm import MaskedBatchNorm
from cl_moe.layers.pairs import Pairs, pair_dot, pair_sum, regular_pairs
from cl_moe.layers.peer_cohort import PEERCohort, balanced_value_std
from cl_moe.layers.precision import activation_by_name, no_autocast, wide
from cl_moe.layers.product_keys import Found, grid_size, retrieve
from cl_moe.layers.routing import ExpertLayer, Routing, Tokens, flat_tokens
from cl_moe.layers.selection import top_k_first


class PEER(ExpertLayer):
    """Each head retrieves its k best experts by product keys; the output sums g act(u . x) v over them.

    f(x) = sum over heads, sum over the k retrieved i of g_i(x) act(u_i . x) v_i (2407.04153, equations 1 to
    5), g the softmax over a head's k scores. All heads share experts and keys. Several cohorts compete: a
    head takes the exact top k over all cohorts' experts; ties go to the oldest. Retrieval and experts compute
    in float32 or wider. With k = 1 and h heads it equals a feed-forward layer with h hidden units.

    Args:
        dim: D, width of input and output.
        num_experts: experts at the start, a square number.
        heads: h, queries per token.
        k: retrieved experts per head, 1 <= k <= experts.
        key_dim: width of a query, even; None: D.
        query_norm: ``"batch"``: batch normalisation of the queries; or ``"none"``.
        activation: ``"relu"`` or ``"gelu"``.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int = 1024,
        heads: int = 8,
        k: int = 16,
        key_dim: int | None = None,
        query_norm: Literal["batch", "none"] = "batch",
        activation: str = "gelu",
    ) -> None:
        super().__init__()
        self.dim, self.heads, self.k = dim, heads, k
        self.key_dim = dim if key_dim is None else key_dim
        self.activation = activation_by_name(activation)
        _check_queries(heads, self.key_dim, query_norm)
        grid_size(num_experts, key="layer.num_experts")
        self._check_k(num_experts)
        self._value_std = balanced_value_std(activation, heads, k)
        self.query = nn.Linear(dim, heads * self.key_dim)
        self.query_norm = MaskedBatchNorm(heads * self.key_dim) if query_norm == "batch" else None
        self.cohorts = nn.ModuleList([PEERCohort(dim, num_experts, self.key_dim, self._value_std)])

    @property
    def shared_router(self) -> tuple[nn.Module, ...]:
        """The query net and its normalisation."""
        return (self.query,) if self.query_norm is None else (self.query, self.query_norm)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, cohorts: Sequence[int] | None = None
    ) -> tuple[Tensor, Routing]:
        """Output of the shape and dtype of ``x``, and the (T, h k) routing, head by head, best first.

        Args:
            x: (..., D) floating.
            mask: (...) bool, False on padding; its output is 0 and it reaches no statistic and no count.
            cohorts: use these cohorts only; None for all.
        """
        self.check_input(x, mask)
        chosen = self.check_cohorts(cohorts)
        self._check_k(sum(self.cohort_sizes[index] for index in chosen))
        tokens = flat_tokens(x, mask)
        with no_autocast(x):
            routing = self._route(tokens, chosen)
            out_TD = self._experts(wide(tokens.x), routing, chosen)
        return out_TD.to(x.dtype).reshape(x.shape), routing

    @torch.no_grad()
    def grow(
        self, num_experts: int, init: str = "fresh", noise: float = 0.01, load: Tensor | None = None
    ) -> None:
        """Append one grid of newborn experts, drawn from torch's global generator; old bytes stay.

        Args:
            num_experts: how many are born, a square number.
            init: ``"fresh"``; ``"copy"`` of the part of the most used cohort's grid where its most used rows
                and columns (by their sums) cross; ``"zero_output"``, with v = 0.
            noise: standard deviation of a copy's noise, relative to the copied tensor's own.
            load: (N,) load that ``"copy"`` ranks by; None: all equal.

        Raises:
            InputError: also where a copy would be larger than the grid it copies.
        """
        self.check_growth(num_experts, init, load)
        newborn = PEERCohort(self.dim, num_experts, self.key_dim, self._value_std)
        newborn = newborn.to(self._cohort(0).u)  # dtype and device of the old ones
        if init == "copy":
            source, load_n = self._most_used_cohort(load, num_experts)
            newborn.copy_most_used(source, load_n, noise)
        elif init == "zero_output":
            newborn.v.zero_()
        self.cohorts.append(newborn)

    def _route(self, tokens: Tokens, chosen: Sequence[int]) -> Routing:
        query_TF = nn.functional.linear(wide(tokens.x), wide(self.query.weight), wide(self.query.bias))
        if self.query_norm is not None:
            query_TF = self.query_norm(query_TF, tokens.valid)
        query_QSH = query_TF.reshape(-1, 2, self.key_dim // 2)
        found = [retrieve(query_QSH, wide(self._cohort(c).keys), self.k) for c in chosen]
        score_QK, expert_QK = self._compete(found, chosen)
        num_tokens = tokens.x.shape[0]
        shape = (num_tokens, self.heads * self.k)
        weight, expert = score_QK.softmax(dim=-1).reshape(shape), expert_QK.reshape(shape)
        kept = torch.ones_like(expert, dtype=torch.bool)
        if tokens.valid is not None:
            kept = tokens.valid.unsqueeze(-1).expand_as(expert)
            weight = weight.masked_fill(~kept, 0.0)
        return Routing(expert, weight, kept, num_tokens, self.num_experts, valid=tokens.valid)

    def _compete(self, found: Sequence[Found], chosen: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(Q, K) scores and ids for life of the top k over all cohorts' candidates, best first."""
        sizes = self.cohort_sizes
        experts = [f.expert + sum(sizes[:c]) for f, c in zip(found, chosen, strict=True)]
        if len(found) == 1:
            return found[0].score, experts[0]
        score_QC, expert_QC = torch.cat([f.score for f in found], dim=1), torch.cat(experts, dim=1)
        # candidates stand in the order that ties go by: cohort by cohort, each best first
        best_QK = top_k_first(score_QC, self.k)
        return score_QC.gather(1, best_QK), expert_QC.gather(1, best_QK)

    def _experts(self, x_TD: Tensor, routing: Routing, chosen: Sequence[int]) -> Tensor:
        """(T, D): each cohort computes its own pairs."""
        sizes = self.cohort_sizes
        if len(chosen) == 1:
            local = routing.expert - sum(sizes[: chosen[0]])
            pairs = regular_pairs(local, sizes[chosen[0]])
            return self._cohort_out(self._cohort(chosen[0]), x_TD, pairs, routing.weight.reshape(-1))
        out_TD = torch.zeros_like(x_TD)
        for c in chosen:
            first = sum(sizes[:c])
            own = (routing.expert >= first) & (routing.expert < first + sizes[c])
            at_P = own.reshape(-1).nonzero().squeeze(-1)
            start_T1 = nn.functional.pad(own.sum(dim=1).cumsum(dim=0), (1, 0))
            pairs = Pairs(
                start_T1, routing.expert.reshape(-1)[at_P] - first, sizes[c], max_per_row=own.shape[1]
            )
            weight_P = routing.weight.reshape(-1).index_select(0, at_P)
            out_TD = out_TD + self._cohort_out(self._cohort(c), x_TD, pairs, weight_P)
        return out_TD

    def _cohort_out(self, cohort: PEERCohort, x_TD: Tensor, pairs: Pairs, weight_P: Tensor) -> Tensor:
        hidden_P = self.activation(pair_dot(x_TD, wide(cohort.u), pairs))
        return pair_sum(hidden_P * weight_P, wide(cohort.v), pairs)

    def check_growth(self, num_experts: int, init: str, load: Tensor | None = None) -> None:
        """Also: the newborn must be a square grid, and a copy no larger than some grid there is."""
        super().check_growth(num_experts, init, load)
        grid_size(num_experts, key="growth.num_experts")
        largest = max(self.cohort_sizes)
        if init == "copy" and num_experts > largest:
            raise InputError(
                got=f"a copy of {num_experts} experts from a cohort of {largest}",
                allowed=f"at most {largest}, or growth.init=fresh",
                key="growth.num_experts",
            )

    def _most_used_cohort(self, load: Tensor | None, at_least: int) -> tuple[PEERCohort, Tensor]:
        """The large enough cohort with the largest load (ties: the oldest), and its experts' load (n,)."""
        load_N = torch.zeros(self.num_experts) if load is None else load.double().cpu()
        loads = load_N.split(list(self.cohort_sizes))
        large = [c for c, size in enumerate(self.cohort_sizes) if size >= at_least]
        best = max(large, key=lambda c: loads[c].sum().item())
        return self._cohort(best), loads[best]

    def _cohort(self, index: int) -> PEERCohort:
        return cast(PEERCohort, self.cohorts[index])

    def _check_k(self, num_experts: int) -> None:
        if not 1 <= self.k <= num_experts:
            allowed = f"1 <= k <= {num_experts}, the number of experts in use"
            raise InputError(got=f"k={self.k}", allowed=allowed, key="layer.k")


def _check_queries(heads: int, key_dim: int, query_norm: str) -> None:
    if heads < 1:
        raise InputError(got=f"heads={heads}", allowed="at least 1", key="layer.heads")
    if key_dim < 2 or key_dim % 2:
        raise InputError(got=f"key_dim={key_dim}", allowed="an even number, at least 2", key="layer.key_dim")
    if query_norm not in ("batch", "none"):
        raise InputError(got=f"query_norm={query_norm}", allowed="batch or none", key="layer.query_norm")
