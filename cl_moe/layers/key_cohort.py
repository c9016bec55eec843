"""What is born together in a product-key layer: sub-keys, and the vectors of the experts they open.

Legend: D width, H half of the key width, r rows (as many columns) of sub-keys, n experts of one cohort, N
experts of a grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from cl_moe.layers.exchange import Exchange
from cl_moe.layers.expert_layer import most_used, noisy_copy
from cl_moe.layers.product_keys import shell_coordinates, shell_index
from cl_moe.layers.queries import Queries, QueryNorm, add_query_net
from cl_moe.layers.tables import ExpertTable


class KeyCohort(nn.Module):
    """The sub-keys of the rows and columns ``rows`` of a grid, and its experts of these shells.

    ``keys`` is (2, r, H), or (h, 2, r, H) with a set for every head, drawn from U(+-1/sqrt(H)) as in the
    authors' code for product-key memories (1907.05242). Expert i of the cohort has id rows.start^2 + i inside
    its grid, and row i of each table.

    Args:
        dim: D.
        rows: 0 .. m - 1 for a grid of its own; n .. m - 1 for what makes an n x n grid an m x m one.
        queries: width of the keys, and the query net.
        stds: the tables by name: (n, D), normal with this standard deviation, drawn in this order.
        keys_per_head: whether each head has sub-keys of its own.
        own_queries: whether the cohort has a query net of its own.
    """

    router_parts = ("keys", "query", "query_norm")
    exchange: Exchange | None = None
    """Where ranks own experts (``spread``), the way to them; None: all are here."""
    query: nn.Linear
    query_norm: QueryNorm | None

    def __init__(
        self,
        dim: int,
        rows: range,
        queries: Queries,
        stds: Mapping[str, float],
        keys_per_head: bool = False,
        own_queries: bool = False,
    ) -> None:
        super().__init__()
        self.rows, self.own_queries = rows, own_queries
        self.num_experts = rows.stop**2 - rows.start**2
        self.tables = tuple(stds)
        if own_queries:
            add_query_net(self, dim, queries)
        half = queries.key_dim // 2
        shape = (*([queries.heads] if keys_per_head else []), 2, len(rows), half)
        self.keys = nn.Parameter(torch.empty(shape).uniform_(-(half**-0.5), half**-0.5))
        for name, std in stds.items():
            setattr(self, name, ExpertTable(torch.randn(self.num_experts, dim).mul_(std)))

    def scores(self, query_QSH: Tensor, side: int, keys_SrH: Tensor, out_Qr: Tensor | None = None) -> Tensor:
        """(Q, r): the queries' products with the sub-keys of one side, ``keys_SrH`` being ``keys``, widened.

        Computed cohort by cohort, so that a growth changes no shape, and with it no bit, of old scores. With
        ``out_Qr``, where there are no gradients, they are written there.
        """
        if keys_SrH.dim() == 3 and out_Qr is not None and keys_SrH.shape[1] > 1:
            return torch.mm(query_QSH[:, side], keys_SrH[side].t(), out=out_Qr)
        score_Qr = self._scores(query_QSH, side, keys_SrH)
        return score_Qr if out_Qr is None else out_Qr.copy_(score_Qr)

    @staticmethod
    def _scores(query_QSH: Tensor, side: int, keys_SrH: Tensor) -> Tensor:
        if keys_SrH.dim() == 3:
            return query_QSH[:, side] @ keys_SrH[side].t()
        heads = keys_SrH.shape[0]
        query_hTH = query_QSH[:, side].reshape(-1, heads, query_QSH.shape[-1]).transpose(0, 1)
        score_hTr = torch.bmm(query_hTH, keys_SrH[:, side].transpose(1, 2))
        return score_hTr.transpose(0, 1).reshape(query_QSH.shape[0], keys_SrH.shape[2])

    def freeze_statistics(self) -> None:
        """Give back where gradients stood: none will come any more."""
        for name in self.tables:
            getattr(self, name).memory.release()

    @torch.no_grad()
    def copy_most_used(self, grid: Sequence[KeyCohort], among: range, load_N: Tensor, noise: float) -> None:
        """Become copies of the most used rows and columns of a grid, plus noise.

        A new sub-key copies the one of the most used row (or column), the next new one that of the next most
        used; an expert copies that at the crossing of the rows and columns its own were copied from.

        Args:
            grid: the cohorts of the grid to copy from, oldest first; this one's own older shells if it has
                any, and any other grid if it has none.
            among: the rows and columns that may be copied, at least as many as there are new ones.
            load_N: (N,) load of the grid's experts; summed over a row or column it ranks that, ties: the
                lower one.
            noise: standard deviation of the noise, relative to the copied tensor's own.
        """
        row_N, column_N = shell_coordinates(torch.arange(load_N.numel()))
        sources = []  # per side: which row of the grid each row up to the last new one is, or copies
        for side, at_N in enumerate((row_N, column_N)):
            use = load_N.new_zeros(grid[-1].rows.stop).index_add(0, at_N, load_N)
            use = use[among.start : among.stop]
            best = most_used(use, use.numel(), use.device)[: len(self.rows)] + among.start
            sources.append(torch.cat([torch.arange(self.rows.start), best]))
            old = _joined([cohort.keys.select(-3, side) for cohort in grid], dim=-2)
            self.keys.select(-3, side).copy_(noisy_copy(old.index_select(-2, best.to(old.device)), noise))
        born = self.rows.start**2
        row, column = shell_coordinates(torch.arange(born, born + self.num_experts))
        crossing = shell_index(sources[0][row], sources[1][column])
        for name in self.tables:
            old = _joined([getattr(cohort, name) for cohort in grid], dim=0)
            getattr(self, name).copy_(noisy_copy(old[crossing.to(old.device)], noise))

    @torch.no_grad()
    def copy_queries(self, source: KeyCohort) -> None:
        """Ask as ``source`` asks: copied keys mean something to such queries only. No noise is added."""
        self.query.load_state_dict(source.query.state_dict())
        if self.query_norm is not None and source.query_norm is not None:
            self.query_norm.load_state_dict(source.query_norm.state_dict())


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=dim)
