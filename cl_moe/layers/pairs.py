"""Sparse sums and dot products over pairs (row, column), with gradients that are fast and deterministic.

The two computations are each other's derivative, so two forward kernels serve both directions: no tensor of
shape (pairs, width) is ever built, nothing is accumulated by atomics, and each output row is summed in the
order of its pairs. (Autograd of the stock kernels gives the same numbers; its backward took 3.4 times as long
for 2,048 tokens x 128 pairs over 1,024 experts of width 64.) The gradient of a table whose columns are few of
many holds these alone, if the table asks for it (``ExpertTable``).

Legend: R rows, C columns, P pairs, D width, R1 = R + 1, U columns that occur.
"""

from __future__ import annotations

import functools
import warnings
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from cl_moe.layers.tables import GradientPlace, gradient_place, sparse_rows

_PIECE_BYTES = 2**20


class Pairs:
    """Which columns belong to each row, sorted by row (compressed sparse rows).

    Args:
        start_R1: (R + 1,) int64, where each row's pairs start; ends with P.
        column_P: (P,) int64 in [0, C); a column may stand twice in a row.
        num_columns: C.
        transpose: the same pairs sorted by column, and the order (P,) that sorts them, where already known.
        max_per_row: how many pairs a row may have; 0: its columns are all different.
    """

    def __init__(
        self,
        start_R1: Tensor,
        column_P: Tensor,
        num_columns: int,
        transpose: tuple[Pairs, Tensor] | None = None,
        max_per_row: int = 0,
    ) -> None:
        self.start_R1, self.column_P, self.num_columns = start_R1, column_P, num_columns
        self._transpose = transpose
        self._sorted: tuple[Tensor, Tensor] | None = None
        self._compact: tuple[Tensor, Pairs] | None = None
        # torch's sampled product refuses more pairs than the full matrix has entries; and the choice must not
        # depend on the pairs themselves, since the two ways differ in their last bits
        self.full_product = max_per_row > num_columns

    @property
    def num_rows(self) -> int:
        """R."""
        return self.start_R1.numel() - 1

    def rows(self) -> Tensor:
        """(P,) the row of every pair."""
        row_R = torch.arange(self.num_rows, device=self.column_P.device)
        return row_R.repeat_interleave(self.start_R1.diff(), output_size=self.column_P.numel())

    def transpose(self) -> tuple[Pairs, Tensor]:
        """The pairs sorted by column (stable), and the order (P,) that sorts them; sorted once, then kept."""
        if self._transpose is None:
            column_P, order_P = self._by_column()
            boundary_C1 = torch.arange(self.num_columns + 1, device=column_P.device)
            start_C1 = torch.searchsorted(column_P, boundary_C1)
            self._transpose = (Pairs(start_C1, self._rows_by(order_P), self.num_rows), order_P)
        return self._transpose

    def compact(self) -> tuple[Tensor, Pairs, Tensor]:
        """The columns (U,) that occur, ascending; pairs of them and rows; the order (P,) of ``transpose``.

        Nothing here is as long as C.
        """
        column_P, order_P = self._by_column()
        if self._compact is None:
            column_U, count_U = column_P.unique_consecutive(return_counts=True)
            start_U1 = nn.functional.pad(count_U.cumsum(0), (1, 0))
            self._compact = column_U, Pairs(start_U1, self._rows_by(order_P), self.num_rows)
        return *self._compact, order_P

    def _by_column(self) -> tuple[Tensor, Tensor]:
        """The columns sorted, and the stable order (P,) that sorts them."""
        if self._sorted is None:
            self._sorted = sorted_columns(self.column_P, self.num_columns)
        return self._sorted

    def _rows_by(self, order_P: Tensor) -> Tensor:
        return self.rows().index_select(0, order_P)


def sorted_columns(column_P: Tensor, num_columns: int) -> tuple[Tensor, Tensor]:
    """Integers (P,) in [0, num_columns) sorted, and the stable order (P,) that sorts them.

    As the shortest integers that they fit into, which takes half the time of int64.
    """
    fitting = (t for t in (torch.uint8, torch.int16, torch.int32) if num_columns <= torch.iinfo(t).max + 1)
    short_P, order_P = column_P.to(next(fitting, torch.int64)).sort(stable=True)
    return short_P.long(), order_P


def regular_pairs(column_RK: Tensor, num_columns: int) -> Pairs:
    """K columns for every row."""
    num_rows, per_row = column_RK.shape
    start_R1 = torch.arange(num_rows + 1, device=column_RK.device) * per_row
    return Pairs(start_R1, column_RK.reshape(-1), num_columns, max_per_row=per_row)


def pair_dot(a_RD: Tensor, b_CD: Tensor, pairs: Pairs) -> Tensor:
    """(P,): ``a[row] . b[column]`` of every pair; float32 or float64."""
    return _Dot.apply(a_RD, b_CD, pairs, gradient_place(b_CD))


def pair_sum(weight_P: Tensor, table_CD: Tensor, pairs: Pairs) -> Tensor:
    """(R, D): for every row the sum of ``weight * table[column]`` over its pairs; float32 or float64."""
    return _Sum.apply(weight_P, table_CD, pairs, gradient_place(table_CD))


def pair_gather(table_RD: Tensor, pairs: Pairs) -> Tensor:
    """(P, D): the table's row of every pair, in the order of columns.

    The columns are 0 .. P - 1, each once: they number the places where rows are copied to. Any float dtype.
    """
    return _Gather.apply(table_RD, pairs)


def _dot(a_RD: Tensor, b_CD: Tensor, pairs: Pairs) -> Tensor:
    if pairs.column_P.numel() == 0:
        return a_RD.new_zeros(0)
    if pairs.full_product:
        return (a_RD @ b_CD.t())[pairs.rows(), pairs.column_P]
    _warn_sparse_beta()
    pattern = torch.sparse_csr_tensor(
        pairs.start_R1,
        pairs.column_P,
        a_RD.new_zeros(pairs.column_P.numel()),
        (pairs.num_rows, pairs.num_columns),
        check_invariants=False,
    )
    return torch.sparse.sampled_addmm(pattern, a_RD, b_CD.t(), beta=0.0).values()


def _bag(table_CD: Tensor, pairs: Pairs, weight_P: Tensor | None) -> Tensor:
    if pairs.column_P.numel() == 0:
        return table_CD.new_zeros(pairs.num_rows, table_CD.shape[1])
    return nn.functional.embedding_bag(
        pairs.column_P,
        table_CD.detach(),  # else torch notes for each pair which bag it is in
        pairs.start_R1,
        mode="sum",
        per_sample_weights=None if weight_P is None else weight_P.detach(),
        include_last_offset=True,
    )


@functools.cache
def _warn_sparse_beta() -> None:
    """Let torch say once, unheard, that its sparse rows are in beta: the tests prove what is used of them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.sparse_csr_tensor([0, 1], [0], [1.0], (1, 1), check_invariants=False)


class _Dot(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a_RD: Tensor, b_CD: Tensor, pairs: Pairs, place: GradientPlace) -> Tensor:
        ctx.save_for_backward(a_RD, b_CD)
        ctx.pairs, ctx.place = pairs, place
        return _dot(a_RD, b_CD, pairs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_P: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        a_RD, b_CD = ctx.saved_tensors
        grad_P = grad_P.contiguous()
        grad_a = _bag(b_CD, ctx.pairs, grad_P) if ctx.needs_input_grad[0] else None
        grad_b = None
        if ctx.needs_input_grad[1]:
            grad_b = _table_gradient(grad_P, a_RD, ctx.pairs, ctx.place)
        return grad_a, grad_b, None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight_P: Tensor, table_CD: Tensor, pairs: Pairs, place: GradientPlace) -> Tensor:
        ctx.save_for_backward(weight_P, table_CD)
        ctx.pairs, ctx.place = pairs, place
        return _bag(table_CD, pairs, weight_P)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        weight_P, table_CD = ctx.saved_tensors
        grad_RD = grad_RD.contiguous()
        grad_weight = _dot(grad_RD, table_CD, ctx.pairs) if ctx.needs_input_grad[0] else None
        grad_table = (
            _table_gradient(weight_P, grad_RD, ctx.pairs, ctx.place) if ctx.needs_input_grad[1] else None
        )
        return grad_weight, grad_table, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table_RD: Tensor, pairs: Pairs) -> Tensor:
        ctx.pairs = pairs
        by_column, _ = pairs.transpose()
        return table_RD.index_select(0, by_column.column_P)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_PD: Tensor) -> tuple[Tensor, None]:
        return _bag(grad_PD.contiguous(), ctx.pairs, None), None


def _table_gradient(weight_P: Tensor, table_RD: Tensor, pairs: Pairs, place: GradientPlace) -> Tensor:
    """(C, D): for every column the sum of ``weight * table[row]`` over its pairs.

    By rows it is a sparse tensor of the columns that occur, the same bit for bit.
    """
    if not place.by_rows:
        by_column, order_P = pairs.transpose()
        return _bag_in(place, table_RD, by_column, weight_P.index_select(0, order_P))
    column_U, by_column, order_P = pairs.compact()
    value_UD = _bag_in(place, table_RD, by_column, weight_P.index_select(0, order_P))
    return sparse_rows(column_U, value_UD, pairs.num_columns)


def _bag_in(place: GradientPlace, table_RD: Tensor, pairs: Pairs, weight_P: Tensor) -> Tensor:
    """``_bag``, put together in the memory that is for it from pieces that stay in a cache."""
    width, num_rows = table_RD.shape[1], pairs.num_rows
    size = max(1, _PIECE_BYTES // (width * table_RD.element_size()))
    if place.memory is None or num_rows <= size:
        return _bag(table_RD, pairs, weight_P)
    out_RD = place.memory.empty((num_rows, width), table_RD)
    bounds = [*pairs.start_R1[:-1:size].tolist(), weight_P.numel()]
    for index, (begin, end) in enumerate(pairwise(bounds)):
        rows = slice(index * size, min((index + 1) * size, num_rows))
        start_R1 = pairs.start_R1[rows.start : rows.stop + 1] - begin
        piece = Pairs(start_R1, pairs.column_P[begin:end], pairs.num_columns)
        out_RD[rows] = _bag(table_RD, piece, weight_P[begin:end])
    return out_RD
