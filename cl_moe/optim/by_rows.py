"""One optimizer over dense parameters and over tables of which a step touches few rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cl_moe.layers.tables import ExpertTable, dense_gradients, row_gradient
from cl_moe.optim.rules import RowRule

ROW_POLICIES = ("auto", "dense", "row")
_FEW = 0.5


class _Due(NamedTuple):
    """The rows of a table that a step moves, and its gradient as it stood."""

    group: dict[str, Any]
    table: ExpertTable
    rows: tuple[Tensor, Tensor]
    grad: Tensor


class ByRows(torch.optim.Optimizer):
    """Steps dense parameters as ``whole`` does, and the touched rows of tables by ``rule``.

    Whether a table learns by rows is settled at its first step and stands in its state (``by_rows``), so that
    a run that is resumed or carries its state goes on in the same way. Under ``"auto"`` it does if that step
    touched less than half of its rows: what is cheaper then. A gradient that is dense all the same (another
    term of the loss looks at the whole table, a strategy has to see all of it) touches every row.

    Args:
        whole: an optimizer over all parameters, tables included unless the rule is for ``always``; None if
            there are only tables and it is.
        rule: for the rows.
        tables: which of the parameters have gradients of rows.
        rows: ``"auto"``, ``"dense"`` or ``"row"``.
        options: of the tables' own group, where ``whole`` does not hold them.
    """

    def __init__(
        self,
        whole: torch.optim.Optimizer | None,
        rule: RowRule,
        tables: Sequence[ExpertTable],
        rows: str,
        options: dict[str, Any] | None = None,
    ) -> None:
        groups = [] if whole is None else list(whole.param_groups)
        if rule.always:
            groups.append({"params": list(tables), **(options or {})})
        super().__init__(groups, {})
        self.whole, self.rule, self.rows, self.tables = whole, rule, rows, set(tables)
        if whole is not None:
            self.state = whole.state
        for table in tables:
            table.by_rows, table.exchanged = rows != "dense", rows == "row"

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; ``closure`` computes the loss anew, as torch's optimizers have it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        due, dense = self._sort()
        if self.whole is not None:
            self.whole.step()
        for group, table, rows, grad in due:
            self.rule.step(table, *rows, self.state[table], group)
            self.state[table]["by_rows"] = table.by_rows
            table.grad = grad
        for table in dense:  # only now: torch's optimizers fill a state that is empty, and no other
            self.state[table]["by_rows"] = False
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, the dense optimizer included."""
        super().load_state_dict(state_dict)
        if self.whole is not None:
            self.whole.state = self.state
            self.whole.param_groups = self.param_groups[: len(self.whole.param_groups)]
        self.go_on()

    def go_on(self) -> None:
        """Ask for the gradients that a loaded state has settled, from the first backward pass on."""
        for table in self.tables if self.rows == "auto" else ():
            if (known := self.state.get(table, {}).get("by_rows")) is not None:
                table.by_rows = known

    def _sort(self) -> tuple[list[_Due], list[ExpertTable]]:
        """Tables that learn by rows, their gradients hidden from the dense optimizer, and the others."""
        due, dense = [], []
        for group in self.param_groups:
            for table in group["params"]:
                if table not in self.tables or table.grad is None:
                    continue
                rows = row_gradient(table)
                if not self._settle(table, len(table) if rows is None else rows[0].numel()):
                    dense_gradients([table])
                    dense.append(table)
                    continue
                rows = (torch.arange(len(table), device=table.device), table.grad) if rows is None else rows
                due.append(_Due(group, table, rows, table.grad))
                table.grad = None
        return due, dense

    def _settle(self, table: ExpertTable, touched: int) -> bool:
        """Whether a table learns by rows; at its first step, also which gradients it asks for from now on."""
        known = self.state[table].get("by_rows") if table in self.state else None
        if known is not None and not self.rule.always:
            table.by_rows = known
        elif known is None and self.rows == "auto":
            table.by_rows = touched < _FEW * len(table)
        return self.rule.always or table.by_rows
