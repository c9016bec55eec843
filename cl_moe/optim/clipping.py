"""Clipping of gradients by their norm, those of rows included."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from cl_moe.layers.ranks import sum_over_ranks
from cl_moe.layers.tables import row_gradient


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale all gradients, in place, so that their norm together is at most ``max_norm``; returns the norm.

    As ``torch.nn.utils.clip_grad_norm_``, which takes no sparse tensors. A row that several passes touched
    counts with its sum; experts that ranks own count once, on every rank.
    """
    held, dense, rows, own = list(parameters), list[Tensor](), list[Tensor](), list[Tensor]()
    for parameter in held:
        touched = row_gradient(parameter)
        values = touched[1] if touched is not None else parameter.grad
        if values is not None:
            kind = own if hasattr(parameter, "own") else dense if touched is None else rows
            kind.append(values)
    if not rows and not any(hasattr(parameter, "own") for parameter in held):
        return nn.utils.clip_grad_norm_(held, max_norm)
    norm = nn.utils.get_total_norm(dense + rows)
    if any(hasattr(parameter, "own") for parameter in held):  # of experts that each rank has to itself
        square = nn.utils.get_total_norm(own).to(norm).square()
        norm = (norm.square() + sum_over_ranks(square)).sqrt()
    torch._foreach_mul_(dense + rows + own, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm
