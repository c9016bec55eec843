"""Products of rows, sorted by expert, with their experts' matrices.

Legend: M rows, I inputs, O outputs, n experts, n1 = n + 1.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn


def grouped_mm(x_MI: Tensor, w_nIO: Tensor, start_n1: Tensor) -> Tensor:
    """(M, O): every row times its expert's matrix.

    Args:
        x_MI: (M, I), M > 0; rows of expert e at ``start_n1[e] : start_n1[e + 1]``.
        w_nIO: (n, I, O), of the same dtype.
        start_n1: (n + 1,) int64, from 0 to M.
    """
    if _stock_serves(w_nIO):
        return nn.functional.grouped_mm(x_MI, w_nIO, offs=start_n1[1:].int())
    return looped_mm(x_MI, w_nIO, start_n1)


def looped_mm(x_MI: Tensor, w_nIO: Tensor, start_n1: Tensor) -> Tensor:
    """What ``F.grouped_mm`` computes, one expert after the other: for what it refuses, and for tests."""
    bounds = start_n1.tolist()
    return torch.cat([x_MI[bounds[e] : bounds[e + 1]] @ w_nIO[e] for e in range(w_nIO.shape[0])])


def _stock_serves(w_nIO: Tensor) -> bool:
    """``F.grouped_mm`` wants rows of whole 16 bytes, and no float64."""
    if w_nIO.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    return all(width * w_nIO.element_size() % 16 == 0 for width in w_nIO.shape[1:])


# ``torch.compile`` cannot see into the product (it knows F.grouped_mm in bfloat16 alone, and a loop would
# have to read the groups' sizes), so compiled code calls it, and its gradients, as operators of one piece.


@torch.library.custom_op("cl_moe::grouped_mm", mutates_args=())
def opaque_grouped_mm(x_MI: Tensor, w_nIO: Tensor, start_n1: Tensor) -> Tensor:
    """``grouped_mm`` as one operator."""
    if x_MI.shape[0] == 0:
        return x_MI.new_zeros(0, w_nIO.shape[2])
    return grouped_mm(x_MI.contiguous(), w_nIO, start_n1)


@torch.library.custom_op("cl_moe::grouped_outer", mutates_args=())
def _grouped_outer(x_MI: Tensor, grad_MO: Tensor, start_n1: Tensor) -> Tensor:
    """(n, I, O): for every expert the sum of its rows' outer products."""
    pieces = pairwise(start_n1.tolist())
    return torch.stack([x_MI[first:last].t() @ grad_MO[first:last] for first, last in pieces])


@opaque_grouped_mm.register_fake
def _fake_mm(x_MI: Tensor, w_nIO: Tensor, start_n1: Tensor) -> Tensor:
    return x_MI.new_empty(x_MI.shape[0], w_nIO.shape[2])


@_grouped_outer.register_fake
def _fake_outer(x_MI: Tensor, grad_MO: Tensor, start_n1: Tensor) -> Tensor:
    return x_MI.new_empty(start_n1.shape[0] - 1, x_MI.shape[1], grad_MO.shape[1])


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_MO: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x_MI, w_nIO, start_n1 = ctx.saved_tensors
    grad_MO = grad_MO.contiguous()
    grad_x = opaque_grouped_mm(grad_MO, w_nIO.transpose(1, 2), start_n1) if ctx.needs_input_grad[0] else None
    grad_w = _grouped_outer(x_MI, grad_MO, start_n1) if ctx.needs_input_grad[1] else None
    return grad_x, grad_w, None


opaque_grouped_mm.register_autograd(_backward, setup_context=_save)
