"""Tables of experts that are single vectors, and gradients that hold only the rows that were read.

Legend: N rows of a table, D width, U touched rows, E entries, in which a row may stand twice.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cl_moe.layers.ranks import num_ranks
from cl_moe.layers.reuse import Reused


class ExpertTable(nn.Parameter):
    """A parameter (N, D) whose row i is one expert's vector; a step reads few of its rows.

    Where ``by_rows`` is set, a backward pass leaves a sparse ``.grad`` with the touched rows alone; an
    optimizer that takes such gradients sets it. A copy of the table, a table in half precision, and what
    stands in for it in a functional call have dense gradients; so have the tables of a compiled layer.

    Attributes:
        by_rows: whether its gradient is to be one of rows.
        exchanged: whether ranks hand each other such gradients, or a rank has this part of a table to itself.
        memory: where its gradients stand, one after the other.
    """

    by_rows: bool
    exchanged: bool
    memory: Reused

    def __new__(cls, data: Tensor, requires_grad: bool = True) -> ExpertTable:
        """As a plain parameter, with dense gradients."""
        table = super().__new__(cls, data, requires_grad)
        table.by_rows = table.exchanged = False
        table.memory = Reused()
        return table


class GradientPlace(NamedTuple):
    """How a table's gradient is to be left.

    Args:
        by_rows: as the rows that occur alone; DDP averages whole gradients.
        memory: where it stands; None: wherever torch puts it.
    """

    by_rows: bool = False
    memory: Reused | None = None


def gradient_place(table: Tensor) -> GradientPlace:
    """What a table asks for; anything else has a dense gradient."""
    if not isinstance(table, ExpertTable):
        return GradientPlace()
    by_rows = table.by_rows and (table.exchanged or num_ranks() == 1)
    return GradientPlace(by_rows, table.memory if table.is_cpu else None)


def sparse_rows(row_U: Tensor, value_UD: Tensor, num_rows: int) -> Tensor:
    """The sparse (N, D) tensor that has these rows and zeros elsewhere.

    Args:
        row_U: (U,) int64, ascending, each once.
        value_UD: (U, D).
        num_rows: N.
    """
    shape = (num_rows, value_UD.shape[1])
    return torch.sparse_coo_tensor(
        row_U.unsqueeze(0), value_UD, shape, is_coalesced=True, check_invariants=False
    )


def row_gradient(parameter: nn.Parameter) -> tuple[Tensor, Tensor] | None:
    """The rows (U,) and values (U, D) of a parameter's gradient, rows ascending and each once.

    Rows that several backward passes left are added in the order in which they came, and ``.grad`` then holds
    the sums: to ask again costs nothing, and to change the values changes the gradient.

    Returns:
        None where there is no gradient, or a dense one.
    """
    grad = parameter.grad
    if grad is None or not grad.is_sparse:
        return None
    row_E, value_ED = grad._indices()[0], grad._values()
    if bool((row_E[1:] > row_E[:-1]).all()):  # autograd forgets what was coalesced
        return row_E, value_ED
    row_U, value_UD = summed_rows(row_E, value_ED)
    parameter.grad = sparse_rows(row_U, value_UD, grad.shape[0])
    return row_U, value_UD


def summed_rows(row_E: Tensor, value_ED: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (U,) ascending, each once, and for each the sum of its values in the order of the entries.

    >>> summed_rows(torch.tensor([2, 0, 2]), torch.tensor([[1.0], [2.0], [3.0]]))
    (tensor([0, 2]), tensor([[2.],
            [4.]]))
    """
    row_E, order_E = row_E.sort(stable=True)
    row_U, count_U = row_E.unique_consecutive(return_counts=True)
    start_U1 = nn.functional.pad(count_U.cumsum(0), (1, 0))
    value_UD = nn.functional.embedding_bag(
        order_E, value_ED.detach(), start_U1, mode="sum", include_last_offset=True
    )
    return row_U, value_UD


def dense_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Turn every gradient of rows into a dense one, for who has to see all of it."""
    for parameter in parameters:
        if (rows := row_gradient(parameter)) is not None:
            dense_ND = torch.zeros_like(parameter)
            parameter.grad = dense_ND.index_copy_(0, *rows)


def dense(gradient: Any) -> Any:
    """A dense gradient as it is, one of rows as a dense tensor."""
    if not isinstance(gradient, Tensor) or not gradient.is_sparse:
        return gradient
    row_U, value_UD = summed_rows(gradient._indices()[0], gradient._values())
    return value_UD.new_zeros(gradient.shape).index_copy_(0, row_U, value_UD)
