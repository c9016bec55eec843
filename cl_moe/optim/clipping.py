"""Clipping of gradients by their norm, those of rows included."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from cl_moe.layers.tables import row_gradient


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale all gradients, in place, so that their norm together is at most ``max_norm``; returns the norm.

    As ``torch.nn.utils.clip_grad_norm_``, which takes no sparse tensors. A row that several passes touched
    counts with its sum.
    """
    held, dense, rows = list(parameters), [], []
    for parameter in held:
        touched = row_gradient(parameter)
        if touched is not None:
            rows.append(touched[1])
        elif parameter.grad is not None:
            dense.append(parameter.grad)
    if not rows:
        return nn.utils.clip_grad_norm_(held, max_norm)
    norm = nn.utils.get_total_norm(dense + rows)
    torch._foreach_mul_(dense + rows, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm
