"""An optimizer's state by the names of parameters: what survives growth, and goes into checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from cl_moe.errors import InputError
from cl_moe.layers.tables import ExpertTable
from cl_moe.optim.by_rows import ByRows

Named = Iterable[tuple[str, nn.Parameter]]
OptimizerState = dict[str, dict[str, Any]]


def state_by_name(optimizer: torch.optim.Optimizer, parameters: Named) -> OptimizerState:
    """An optimizer's state keyed by parameter name: a key that survives growth."""
    return {name: dict(optimizer.state[p]) for name, p in parameters if p in optimizer.state}


def load_state_by_name(
    optimizer: torch.optim.Optimizer, parameters: Named, state: Mapping[str, Mapping[str, Any]]
) -> None:
    """Give survivors their state back; newborns start without one. Tensors are copied, not shared.

    Raises:
        InputError: what was remembered row by row is to go on as if all rows had been stepped alike, or a
            table that is to learn by rows learnt as a whole.
    """
    held = {p for group in optimizer.param_groups for p in group["params"]}
    lazy = optimizer if isinstance(optimizer, ByRows) else None
    for name, parameter in parameters:
        if parameter not in held or name not in state:
            continue
        table = isinstance(parameter, ExpertTable | DTensor)  # of pieces all rows are stepped alike
        if table and not (lazy and lazy.rule.always):
            _check_rows(name, state[name].get("by_rows"), lazy.rows if lazy else "dense")
        optimizer.state[parameter] = {key: _own(value, parameter) for key, value in state[name].items()}
    if lazy:
        lazy.go_on()


def _own(value: Any, parameter: nn.Parameter) -> Any:
    """A copy; of a parameter that lies in pieces on several ranks, this rank's piece of it."""
    if not isinstance(value, Tensor):
        return value
    own: range | None = getattr(parameter, "own", None)  # experts of which ranks hold their own
    if own is not None and value.shape[:1] == (parameter.num_whole,):  # type: ignore[attr-defined]
        return value[own.start : own.stop].clone()
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value.clone()
    places = parameter.device_mesh, parameter.placements
    return distribute_tensor(value.to(parameter.device), *places, src_data_rank=None)


def begin_anew(state: OptimizerState, name: str, shape: Sequence[int], rows: Sequence[int]) -> None:
    """Let rows of a parameter (experts of a cohort) start without a past, beside others that keep theirs.

    Momentum becomes 0. A parameter has one count of steps, which the others need, so AdamW's correction for a
    short past is not made any more: with squares of 0 the first step would be (1 - beta1) / sqrt(1 - beta2),
    about three times, as long as it should be. The squares are therefore the other rows' mean: the first
    steps are short, as in a warm-up, and no longer than theirs. Where no other row is left, the state goes.

    Args:
        state: changed in place.
        name: of the parameter.
        shape: of the parameter, (N, ...).
        rows: in 0 .. N - 1.
    """
    others = [row for row in range(shape[0]) if row not in rows]
    if not others:
        state.pop(name, None)
        return
    for key, value in state.get(name, {}).items():
        if isinstance(value, Tensor) and value.shape == torch.Size(shape):
            value[list(rows)] = value[others].mean(dim=0) if key == "exp_avg_sq" else 0.0


def _check_rows(name: str, by_rows: bool | None, rows: str) -> None:
    if by_rows is None or rows in ("auto", "row" if by_rows else "dense"):
        return
    kept = "row" if by_rows else "dense"
    raise InputError(
        got=f"optimizer.rows={rows} with a state of {name} that was kept by rows={kept}",
        allowed=f"optimizer.rows=auto or {kept}, which go on with it, or optimizer.state=reset",
        key="optimizer.rows",
    )
