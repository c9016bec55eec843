"""Experts that are spread over ranks, each owned by one: tokens, or rows of tables, go there and back.

A layer without an exchange computes with what it holds: one process is the special case that costs nothing.
With one, each rank holds its own experts of every cohort, routes its own tokens by all keys, which stay
whole on every rank, and calls upon the owners. Every rank must then compute equally often.

Gradients of own experts are those of the sum of all ranks' losses; gradients of tokens are the rank's own.

Legend: W ranks, D width; M rows that this rank sends, R that it gets; E experts of all cohorts in use,
ordered by owner, cohort and id, e of them this rank's own; n experts of one cohort, n1 = n + 1; U rows of a
table that this rank reads, V that it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cl_moe.layers.tables import ExpertTable, sparse_rows, summed_rows

Compute = Callable[[Tensor, list[Tensor]], Tensor]


class Exchange:
    """The ways between ranks, and who owns what: of n experts rank r those from n r / W to n (r + 1) / W.

    Args:
        group: a process group that nothing else uses during a backward pass; None: the default one.

    Attributes:
        sent: bytes that this rank has sent to others, forward and backward.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group, self.sent = group, 0
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def __deepcopy__(self, memo: dict[int, Any]) -> Exchange:
        """A copy of a layer goes the same ways."""
        return self

    def own(self, num: int, rank: int | None = None) -> range:
        """Which of ``num`` experts a rank (None: this one) owns."""
        rank = self.rank if rank is None else rank
        return range(num * rank // self.size, num * (rank + 1) // self.size)

    def order(self, sizes: Sequence[int], device: torch.device) -> Tensor:
        """(E,) int64: the place of each expert, cohort by cohort, when they are ordered by owner."""
        firsts = [sum(sizes[:c]) for c in range(len(sizes))]
        by_owner = [
            torch.arange(first + own.start, first + own.stop, device=device)
            for rank in range(self.size)
            for first, own in ((first, self.own(num, rank)) for first, num in zip(firsts, sizes, strict=True))
        ]
        ids_E = torch.cat(by_owner)
        return torch.empty_like(ids_E).scatter_(0, ids_E, torch.arange(len(ids_E), device=device))

    def compute(self, rows_MD: Tensor, count_E: Tensor, sizes: Sequence[int], experts: Compute) -> Tensor:
        """(M, D): for every row what its expert makes of it, wherever that is.

        Args:
            rows_MD: (M, D) sorted by the experts' places (``order``).
            count_E: (E,) int64, rows of each expert.
            sizes: experts of each cohort in use.
            experts: computes rows sorted by own experts, given for each cohort (n + 1,) where those of its
                own experts start among all.
        """
        shares = [sum(len(self.own(num, rank)) for num in sizes) for rank in range(self.size)]
        sent_W = torch.stack([part.sum() for part in count_E.split(shares)])
        count_We = self._swap(count_E, shares, [shares[self.rank]] * self.size).reshape(self.size, -1)
        there, back = sent_W.tolist(), count_We.sum(dim=1).tolist()
        rows_RD = _Sent.apply(rows_MD, self, there, back)
        expert_R = torch.arange(count_We.shape[1], device=rows_MD.device).repeat(self.size)
        order_R = expert_R.repeat_interleave(count_We.reshape(-1)).sort(stable=True).indices
        start_e1 = torch.nn.functional.pad(count_We.sum(dim=0).cumsum(0), (1, 0))
        edges = [0]
        for num in sizes:
            edges.append(edges[-1] + len(self.own(num)))
        starts = [start_e1[a : b + 1] for a, b in pairwise(edges)]
        out_RD = experts(rows_RD.index_select(0, order_R), starts)
        inverse_R = torch.empty_like(order_R).scatter_(
            0, order_R, torch.arange(len(order_R), device=order_R.device)
        )
        return _Sent.apply(out_RD.index_select(0, inverse_R), self, back, there)

    def ask(self, row_U: Tensor, num_rows: int) -> Asked:
        """Tell the owners of a table which of its rows this rank reads.

        Args:
            row_U: (U,) int64, ascending, each once.
            num_rows: of the whole table.
        """
        bounds = [self.own(num_rows, rank).start for rank in range(self.size)] + [num_rows]
        edge_W1 = torch.searchsorted(row_U, torch.tensor(bounds, device=row_U.device))
        asked_W = edge_W1.diff()
        told_W = self._swap(asked_W, [1] * self.size, [1] * self.size)
        there, back = asked_W.tolist(), told_W.tolist()
        row_V = self._swap(row_U, there, back) - self.own(num_rows).start
        return Asked(self, row_V, there, back)

    def _swap(self, x: Tensor, there: Sequence[int], back: Sequence[int]) -> Tensor:
        """To rank r the r-th part of ``x``; returns what the ranks sent, in their order."""
        out = x.new_empty(sum(back), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), list(back), list(there), group=self.group)
        each = x[:1].numel() if len(x) else 0
        self.sent += (sum(there) - there[self.rank]) * each * x.element_size()
        return out


class Asked(NamedTuple):
    """Rows of a table on their way from their owners; ask for them once for all tables of a cohort.

    Args:
        exchange: the ways.
        asked: (V,) int64, rows among this rank's own that others (and itself) read, reader by reader.
        there: how many rows of each owner this rank reads.
        back: how many of its own each rank reads.
    """

    exchange: Exchange
    asked: Tensor
    there: list[int]
    back: list[int]

    def rows(self, own_nD: Tensor, by_rows: bool = False) -> Tensor:
        """(U, D): the rows asked for, of a table of which this rank holds ``own_nD``.

        Its gradient goes back to the owners, each of whom adds up what its readers send, in their order.

        Args:
            own_nD: (n, D).
            by_rows: leave a gradient of rows.
        """
        return _Rows.apply(own_nD, self, by_rows)


class _Sent(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: Exchange, there: list[int], back: list[int]) -> Tensor:
        ctx.exchange, ctx.there, ctx.back = exchange, there, back
        return exchange._swap(x, there, back)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.exchange._swap(grad, ctx.back, ctx.there), None, None, None


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own_nD: Tensor, asked: Asked, by_rows: bool) -> Tensor:
        ctx.asked, ctx.by_rows, ctx.num_own = asked, by_rows, own_nD.shape[0]
        return asked.exchange._swap(own_nD.index_select(0, asked.asked), asked.back, asked.there)

    @staticmethod
    def backward(ctx: Any, grad_UD: Tensor) -> tuple[Tensor | None, None, None]:
        asked: Asked = ctx.asked
        grad_VD = asked.exchange._swap(grad_UD, asked.there, asked.back)
        if len(grad_VD):
            row_v, sum_vD = summed_rows(asked.asked, grad_VD)
        else:
            row_v, sum_vD = asked.asked, grad_VD
        if ctx.by_rows:
            return sparse_rows(row_v, sum_vD, ctx.num_own), None, None
        whole_nD = grad_VD.new_zeros(ctx.num_own, grad_VD.shape[1])
        return whole_nD.index_copy_(0, row_v, sum_vD), None, None


def spread(layer: nn.Module, exchange: Exchange) -> None:
    """Leave this rank its own experts of every cohort of a layer; keys and all that is shared stay whole.

    Args:
        layer: an ``ExpertLayer``, the same on every rank; changed in place.
        exchange: the ways to the others.
    """
    for cohort in layer.cohorts:  # type: ignore[union-attr]
        for name in owned(cohort):
            whole = cohort.get_parameter(name)
            own = exchange.own(len(whole))
            part = type(whole)(whole.detach()[own.start : own.stop].clone(), whole.requires_grad)
            part.own, part.num_whole = own, len(whole)
            if isinstance(whole, ExpertTable):
                part.by_rows, part.exchanged = whole.by_rows, True
            setattr(cohort, name, part)
        cohort.exchange = exchange


def owned(cohort: nn.Module) -> list[str]:
    """The parameters of a cohort that hold its experts one after the other: what ranks can divide."""
    parts: tuple[str, ...] = cohort.router_parts  # type: ignore[assignment]
    return [name for name, _ in cohort.named_parameters(recurse=False) if name not in parts]


def gathered(own_nX: Tensor, num: int, exchange: Exchange) -> Tensor:
    """(num, ...): the parts of all ranks of what holds ``num`` experts, on every rank."""
    most = max(len(exchange.own(num, rank)) for rank in range(exchange.size))
    padded = own_nX.new_zeros(most, *own_nX.shape[1:])
    padded[: len(own_nX)] = own_nX
    parts = [torch.empty_like(padded) for _ in range(exchange.size)]
    dist.all_gather(parts, padded, group=exchange.group)
    return torch.cat([part[: len(exchange.own(num, rank))] for rank, part in enumerate(parts)])
