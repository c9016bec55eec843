"""How an optimizer moves the touched rows of a table, and what it remembers of each row.

A row that no token read in a step stands still in that step: it does not decay, its momentum neither fades
nor moves it, and its steps are not counted. So each row learns as a parameter of its own would whose steps
are those that touched it; where every step touches every row, that is what torch's optimizers do.

Work goes through the rows in portions that stay in a processor's cache.

Legend: N rows of a table, D width, U touched rows, B rows of a portion.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

_PORTION_BYTES = 2**19
State = dict[str, Any]


class RowRule(ABC):
    """One step of the touched rows.

    Attributes:
        always: whether tables learn by it even where all rows are touched, since no other optimizer remembers
            the same of them.
    """

    always = False

    @abstractmethod
    def step(
        self, table_ND: Tensor, row_U: Tensor, grad_UD: Tensor, state: State, group: Mapping[str, Any]
    ) -> None:
        """Change rows and state in place.

        Args:
            table_ND: the parameter.
            row_U: (U,) int64, ascending, each once.
            grad_UD: their gradients; left as they are.
            state: empty at first; that of a dense optimizer of the same kind is taken over.
            group: ``lr`` and what else the rule knows.
        """


class AdamRows(RowRule):
    """Adam with decoupled weight decay (1711.05101, algorithm 2), each row with a step count of its own.

    ``state`` holds ``step`` (N,), ``exp_avg`` and ``exp_avg_sq`` (N, D).
    """

    def step(
        self, table_ND: Tensor, row_U: Tensor, grad_UD: Tensor, state: State, group: Mapping[str, Any]
    ) -> None:
        """As the base class says."""
        for name in ("exp_avg", "exp_avg_sq"):
            if name not in state:
                state[name] = torch.zeros_like(table_ND)
        state["step"] = step_N = _by_row(state.get("step"), table_ND)
        step_N[row_U] += 1
        step_U, (beta1, beta2), lr = step_N[row_U].double(), group["betas"], group["lr"]
        root_U = (1 - beta2**step_U).sqrt()
        size_U1 = (-lr * root_U / (1 - beta1**step_U)).to(table_ND).unsqueeze(1)
        eps_U1 = (group["eps"] * root_U).to(table_ND).unsqueeze(1)
        for part in portions(grad_UD):
            row_B, grad_BD = row_U[part], grad_UD[part]
            mean_BD = state["exp_avg"].index_select(0, row_B).lerp_(grad_BD, 1 - beta1)
            state["exp_avg"].index_copy_(0, row_B, mean_BD)
            square_BD = state["exp_avg_sq"].index_select(0, row_B).mul_(beta2)
            square_BD.addcmul_(grad_BD, grad_BD, value=1 - beta2)
            state["exp_avg_sq"].index_copy_(0, row_B, square_BD)
            below_BD = square_BD.sqrt_().add_(eps_U1[part])  # both corrections stand in size and eps
            value_BD = table_ND.index_select(0, row_B).mul_(1 - lr * group["weight_decay"])
            table_ND.index_copy_(0, row_B, value_BD.addcdiv_(mean_BD.mul_(size_U1[part]), below_BD))


class SGDRows(RowRule):
    """Gradient descent with momentum and weight decay as torch has them, both of touched rows only.

    ``state`` holds ``momentum_buffer`` (N, D) where there is momentum.
    """

    def step(
        self, table_ND: Tensor, row_U: Tensor, grad_UD: Tensor, state: State, group: Mapping[str, Any]
    ) -> None:
        """As the base class says."""
        if group["momentum"] and "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(table_ND)
        for part in portions(grad_UD):
            row_B, way_BD = row_U[part], grad_UD[part]
            value_BD = table_ND.index_select(0, row_B)
            if group["weight_decay"]:
                way_BD = way_BD.add(value_BD, alpha=group["weight_decay"])
            if group["momentum"]:
                buffer_ND = state["momentum_buffer"]
                way_BD = buffer_ND.index_select(0, row_B).mul_(group["momentum"]).add_(way_BD)
                buffer_ND.index_copy_(0, row_B, way_BD)
            table_ND.index_copy_(0, row_B, value_BD.add_(way_BD, alpha=-group["lr"]))


class AdagradRows(RowRule):
    """Adagrad (Duchi et al. 2011) with one accumulator per row: the sum of its gradients' mean squares.

    It remembers one number where Adam remembers 2 D, and no row waits for anything: one without a gradient
    would not move in any case. ``state`` holds ``sum`` (N,).
    """

    always = True

    def step(
        self, table_ND: Tensor, row_U: Tensor, grad_UD: Tensor, state: State, group: Mapping[str, Any]
    ) -> None:
        """As the base class says."""
        state["sum"] = sum_N = _by_row(state.get("sum"), table_ND)
        for part in portions(grad_UD):
            row_B, grad_BD = row_U[part], grad_UD[part]
            sum_B = sum_N.index_select(0, row_B).add_(grad_BD.square().mean(dim=1))
            sum_N.index_copy_(0, row_B, sum_B)
            size_B1 = (-group["lr"] / (sum_B.sqrt() + group["eps"])).unsqueeze(1)
            table_ND.index_copy_(0, row_B, table_ND.index_select(0, row_B).addcmul_(grad_BD, size_B1))


def portions(rows_UD: Tensor) -> Iterator[slice]:
    """Slices of rows, each of about half a megabyte; all at once on a GPU."""
    if not rows_UD.is_cpu:
        yield slice(0, rows_UD.shape[0])
        return
    size = max(1, _PORTION_BYTES // max(1, rows_UD.shape[1] * rows_UD.element_size()))
    for start in range(0, rows_UD.shape[0], size):
        yield slice(start, start + size)


def _by_row(value: Tensor | None, table_ND: Tensor) -> Tensor:
    """(N,): what is remembered of each row; 0 at first, the one number of a dense optimizer for all."""
    if value is None:
        return table_ND.new_zeros(table_ND.shape[0])
    if value.dim() == 0:
        return value.to(table_ND).expand(table_ND.shape[0]).clone()
    return value
