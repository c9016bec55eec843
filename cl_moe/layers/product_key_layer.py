"""What PEER and product-key memories share: queries, retrieval, growth. What an expert computes is their own.

Legend: T tokens, D width, h heads, k retrieved experts per head, K = h k choices per token (times the cohorts
under the policy ``sum``), Q = T h queries, S = 2 sides of a key, H half of the key width, m grid size, N
experts of the layer.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from cl_moe.errors import InputError
from cl_moe.layers.crossings import with_gradient
from cl_moe.layers.expert_layer import ExpertLayer
from cl_moe.layers.key_cohort import KeyCohort
from cl_moe.layers.key_scores import ScoreRoom, differentiable_scores
from cl_moe.layers.precision import no_autocast, wide
from cl_moe.layers.product_keys import Found, grid_size, joined
from cl_moe.layers.queries import Queries, QueryNorm, add_query_net, ask
from cl_moe.layers.retrieval import Retrieval
from cl_moe.layers.routing import Routing
from cl_moe.layers.several_grids import KeyScores
from cl_moe.layers.tokens import Tokens, flat_tokens
from cl_moe.layers.vector_experts import Dot, Part, expert_sum

_QUERIES = 1024


class ProductKeyLayer(ExpertLayer):
    """Heads retrieve experts by product keys; the output is a sum of the retrieved experts' vectors ``v``.

    Retrieval and experts compute in float32 or wider. Ties go to the oldest cohort, inside a grid to the
    lower shell, then row, then column; that is the rule for equal scores of sub-keys, see ``search`` for sums
    that are equal by rounding alone.

    What freezing a cohort means for scores: a sub-key's score is its product with a query, so a frozen
    cohort's scores stay only if its query net is frozen too (``freeze(shared=True)``, or a query net per
    cohort, which is frozen with it). In a grid grown by shells most newborns pair a new sub-key with an old
    one. Where the old shells are frozen, such a newborn learns through its new half alone; where they are
    not, it moves the old sub-keys, and with them old experts' scores. Freezing a younger cohort while an
    older one learns keeps the bytes of the younger, but not the scores of its pairs with the older.

    Args:
        dim: D.
        num_experts: experts at the start, a square number.
        queries: heads, k, width and normalisation of the queries.
        retrieval: see ``Retrieval``.
        stds: the experts' tables by name, with the standard deviation they are drawn with; ``v`` among them.
    """

    router_parts = ("query", "query_norm")
    query: nn.Linear
    query_norm: QueryNorm | None

    def __init__(
        self,
        dim: int,
        num_experts: int,
        queries: Queries,
        retrieval: Retrieval,
        stds: Mapping[str, float],
    ) -> None:
        super().__init__()
        self.dim, self.heads, self.k, self.key_dim = dim, queries.heads, queries.k, queries.key_dim
        self.queries, self.retrieval, self._stds = queries.check(), retrieval, dict(stds)
        rows = range(grid_size(num_experts, key="layer.num_experts"))
        self._check_k([num_experts])
        if not self._own_queries:
            add_query_net(self, dim, queries)
        self.cohorts = nn.ModuleList([self._newborn(rows)])

    @abstractmethod
    def coefficients(self, dot: Dot, weight: Tensor) -> Tensor:
        """What each choice multiplies its expert's ``v`` by, in the shape of ``weight``.

        Args:
            dot: ``dot("u")`` is u . x of every choice, for each table.
            weight: gating weights, any shape.
        """

    def active_parameters(self) -> int:
        """All but the experts that are not retrieved: h k of them are, under ``sum`` of each cohort.

        Scoring takes all sub-keys; two heads that retrieve the same expert count it twice.
        """
        lists = len(self.cohorts) if self.retrieval.policy == "sum" else 1
        chosen = min(self.heads * self.k * lists, self.num_experts)
        return super().active_parameters() - (self.num_experts - chosen) * len(self._stds) * self.dim

    @property
    def shared_router(self) -> tuple[nn.Module, ...]:
        """The query net and its normalisation, where all cohorts share them."""
        if self._own_queries:
            return ()
        return (self.query,) if self.query_norm is None else (self.query, self.query_norm)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, cohorts: Sequence[int] | None = None
    ) -> tuple[Tensor, Routing]:
        """Output of the shape and dtype of ``x``, and the (T, K) routing, head by head, best first.

        Under the policy ``sum`` K = h k times the cohorts in use: a list for each, oldest first.

        Args:
            x: (..., D) floating.
            mask: (...) bool, False on padding; its output is 0 and it reaches no statistic and no count.
            cohorts: use these cohorts' experts only; None for all.
        """
        self.check_input(x, mask)
        chosen = self.check_cohorts(cohorts)
        self._check_k([self.cohort_sizes[index] for index in chosen])
        tokens = flat_tokens(x, mask)
        with no_autocast(x):
            routing = self._route(tokens, chosen)
            out_TD = expert_sum(wide(tokens.x), routing, self._parts(chosen), self.coefficients)
        return out_TD.to(x.dtype).reshape(x.shape), routing

    @torch.no_grad()
    def grow(
        self, num_experts: int, init: str = "fresh", noise: float = 0.01, load: Tensor | None = None
    ) -> None:
        """Append one cohort of newborn experts, drawn from torch's global generator; old bytes stay.

        Args:
            num_experts: how many are born: a square number, or by shells what completes a larger grid.
            init: ``"fresh"``; ``"copy"`` of where the most used rows and columns (by their sums) cross, in
                the most used cohort's grid, or by shells in the one grid; ``"zero_output"``, with v = 0. A
                newborn's own query net copies that of the cohort its keys are copied from. Under the policy
                ``sum`` a copy adds to what it copies, and ``"zero_output"`` leaves the function as it is.
            noise: standard deviation of a copy's noise, relative to the copied tensor's own.
            load: (N,) load that ``"copy"`` ranks by; None: all equal.

        Raises:
            InputError: also where a copy would have more rows than what it copies.
        """
        self.check_growth(num_experts, init, load, noise)
        newborn = self._newborn(self._rows_born(num_experts, self.num_experts))
        newborn = newborn.to(self._cohort(0).keys).train(self.training)  # dtype and device of the old
        if init == "copy":
            self._copy_into(newborn, load, noise)
        elif init == "zero_output":
            cast(Tensor, newborn.v).zero_()
        self.cohorts.append(newborn)

    def check_growth(
        self, num_experts: int, init: str, load: Tensor | None = None, noise: float = 0.0
    ) -> None:
        """Also: newborns must make whole grids, under ``sum`` of at least k experts; copies need a source."""
        super().check_growth(num_experts, init, load, noise)
        self._check_birth(num_experts, init, self.num_experts, self._largest)

    def check_growths(self, sizes: Sequence[int], init: str) -> None:
        """Refuse a plan of growths, one after the other, of which some could not be carried out."""
        total, largest = self.num_experts, self._largest
        for size in sizes:
            super().check_growth(size, init)
            largest = max(largest, self._check_birth(size, init, total, largest))
            total += size

    def birth_parameters(self, num_experts: int, total: int, hidden: int | None = None) -> int:
        """Of experts and keys, and of a query net of their own."""
        with torch.device("meta"):
            newborn = self._newborn(self._rows_born(num_experts, total))
        return sum(parameter.numel() for parameter in newborn.parameters())

    @property
    def _largest(self) -> int:
        """Rows of the cohort that has the most."""
        return max(len(self._cohort(c).rows) for c in range(len(self.cohorts)))

    def _check_birth(self, num_experts: int, init: str, total: int, largest: int) -> int:
        """Rows of newborns in a layer of ``total`` experts whose cohorts have at most ``largest`` rows."""
        rows = self._rows_born(num_experts, total)
        if self.retrieval.policy == "sum" and num_experts < self.k:
            raise InputError(
                got=f"growth by {num_experts} experts, with k={self.k} for every cohort",
                allowed=f"at least {self.k}, or layer.retrieval.policy=compete",
                key="growth.num_experts",
            )
        if self._by_shells and not self._own_queries:
            largest = rows.start
        if init == "copy" and len(rows) > largest:
            raise InputError(
                got=f"a copy of {len(rows)} rows ({num_experts} experts) from {largest} rows",
                allowed=f"at most {largest} rows, or growth.init=fresh",
                key="growth.num_experts",
            )
        return len(rows)

    @property
    def _own_queries(self) -> bool:
        return self.retrieval.queries == "per_cohort"

    @property
    def _by_shells(self) -> bool:
        return self.retrieval.grow_by == "shell"

    def _rows_born(self, num_experts: int, total: int) -> range:
        """Rows of the sub-keys of newborns in a layer of ``total`` experts."""
        if not self._by_shells:
            return range(grid_size(num_experts, key="growth.num_experts"))
        old, new = math.isqrt(total), math.isqrt(total + num_experts)
        if new * new != total + num_experts:
            fits = 2 * old + 1, max(new, old + 2) ** 2 - total
            raise InputError(
                got=f"growth by {num_experts} experts of a grid of {old} x {old}, in place by shells",
                allowed=f"what makes it square again, such as {fits[0]} or {fits[1]}",
                key="growth.num_experts",
            )
        return range(old, new)

    def _newborn(self, rows: range) -> KeyCohort:
        per_head = self.retrieval.keys == "per_head"
        return KeyCohort(self.dim, rows, self.queries, self._stds, per_head, self._own_queries)

    def _copy_into(self, newborn: KeyCohort, load: Tensor | None, noise: float) -> None:
        load_N = torch.zeros(self.num_experts) if load is None else load.double().cpu()
        loads = load_N.split(list(self.cohort_sizes))
        whole = [self._cohort(c) for c in range(len(self.cohorts))]
        large = [c for c, cohort in enumerate(whole) if len(cohort.rows) >= len(newborn.rows)]
        best = max(large, key=lambda c: loads[c].sum().item(), default=0)  # ties: the oldest
        if not self._by_shells:
            newborn.copy_most_used([whole[best]], whole[best].rows, loads[best], noise)
        else:
            among = whole[best].rows if self._own_queries else range(newborn.rows.start)
            newborn.copy_most_used(whole, among, load_N, noise)
        if self._own_queries:
            newborn.copy_queries(whole[best])

    def _route(self, tokens: Tokens, chosen: Sequence[int]) -> Routing:
        found = self._retrieve(tokens, chosen)
        num_tokens = tokens.x.shape[0]
        shape = (num_tokens, self.heads * self.k)
        weights = [self.retrieval.weights(f.score).reshape(shape) for f in found]
        experts = [f.expert.reshape(shape) for f in found]
        weight = weights[0] if len(found) == 1 else torch.cat(weights, dim=1)
        expert = experts[0] if len(found) == 1 else torch.cat(experts, dim=1)
        kept = torch.ones_like(expert, dtype=torch.bool)
        if tokens.valid is not None:
            kept = tokens.valid.unsqueeze(-1).expand_as(expert)
            weight = weight.masked_fill(~kept, 0.0)
        return Routing(expert, weight, kept, num_tokens, self.num_experts, valid=tokens.valid)

    def _retrieve(self, tokens: Tokens, chosen: Sequence[int]) -> list[Found]:
        """What heads take, (Q, k) with ids for life: one list, or under ``sum`` one of each cohort."""
        asked = range(chosen[-1] + 1) if self._by_shells else chosen  # young shells have pairs with old ones
        shared_QSH = None if self._own_queries else ask(self, tokens, self.queries)
        # What the compiler sees, and a query net of each cohort, keep to the gradients of all scores.
        if shared_QSH is None or torch.compiler.is_compiling():
            return self._search(self._scores(tokens, shared_QSH, asked), chosen)
        with torch.no_grad():
            pieces = shared_QSH.split(self._piece if shared_QSH.is_cpu else max(1, shared_QSH.shape[0]))
            score = ScoreRoom([self._cohort(c) for c in asked], pieces[0])
            lists = [self._search(score(piece_QSH), chosen) for piece_QSH in pieces]
            found = lists[0] if len(lists) == 1 else [joined(one) for one in zip(*lists, strict=True)]
        return self._learnable(found, shared_QSH, asked)

    @property
    def _piece(self) -> int:
        """How many queries are searched at once: whole tokens, few enough for a processor's cache."""
        return self.heads * max(1, _QUERIES // self.heads)

    def _search(self, scores: KeyScores, chosen: Sequence[int]) -> list[Found]:
        firsts = {c: sum(self.cohort_sizes[:c]) for c in chosen}
        return self.retrieval.search(scores, {c: self._cohort(c).rows for c in chosen}, firsts, self.k)

    def _learnable(self, found: Sequence[Found], query_QSH: Tensor, asked: Sequence[int]) -> list[Found]:
        firsts = None if self._by_shells else [sum(self.cohort_sizes[:c]) for c in asked]
        owners = [self._cohort(c) for c in asked]
        return [with_gradient(one, query_QSH, owners, firsts, self.heads) for one in found]

    def _scores(self, tokens: Tokens, query_QSH: Tensor | None, asked: Sequence[int]) -> KeyScores:
        cohorts = [self._cohort(c) for c in asked]
        queries = [ask(c, tokens, self.queries) if query_QSH is None else query_QSH for c in cohorts]
        return differentiable_scores(cohorts, queries)

    def _parts(self, chosen: Sequence[int]) -> list[Part]:
        """The cohorts in use, and which columns of the routing are theirs."""
        share = self.heads * self.k
        apart = self.retrieval.policy == "sum" or len(chosen) == 1
        return [
            Part(self._cohort(c), sum(self.cohort_sizes[:c]), slice(at, at + share) if apart else None)
            for at, c in zip(range(0, share * len(chosen), share), chosen, strict=True)
        ]

    def _cohort(self, index: int) -> KeyCohort:
        return cast(KeyCohort, self.cohorts[index])

    def _check_k(self, sizes: Sequence[int]) -> None:
        """Each head takes k of all experts in use, or under ``sum`` of every cohort's."""
        most = min(sizes) if self.retrieval.policy == "sum" else sum(sizes)
        if not 1 <= self.k <= most:
            allowed = f"1 <= k <= {most}, the number of experts in use"
            raise InputError(got=f"k={self.k}", allowed=allowed, key="layer.k")
