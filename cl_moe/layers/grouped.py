"""Products of rows, sorted by expert, with their experts' matrices.

Legend: M rows, I inputs, O outputs, n experts, n1 = n + 1.
"""

from __future__ import annotations

from collections.abc import Sequence
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
def opaque_grouped_mm(x_MI: Tensor, w_nIO: Sequence[Tensor], start_n1: Tensor, whole: bool) -> Tensor:
    """``grouped_mm`` as one operator; matrices that do not learn cost no gradient.

    Args:
        x_MI: (M, I).
        w_nIO: the experts' matrices cohort by cohort, (n, I, O) together.
        start_n1: (n + 1,) int64.
        whole: whether every row is some expert's. Else those behind the last group are 0 and cost nothing but
            a look at where it ends (for which a GPU is waited for).
    """
    num_rows = x_MI.shape[0] if whole else int(start_n1[-1])
    if num_rows == 0:
        return x_MI.new_zeros(x_MI.shape[0], w_nIO[0].shape[2])
    stacked = w_nIO[0] if len(w_nIO) == 1 else torch.cat(list(w_nIO))
    out_MO = grouped_mm(x_MI[:num_rows].contiguous(), stacked, start_n1)
    return nn.functional.pad(out_MO, (0, 0, 0, x_MI.shape[0] - num_rows)) if not whole else out_MO


@torch.library.custom_op("cl_moe::grouped_outer", mutates_args=())
def _grouped_outer(x_MI: Tensor, grad_MO: Tensor, start_n1: Tensor) -> Tensor:
    """(n, I, O): for every expert the sum of its rows' outer products."""
    pieces = pairwise(start_n1.tolist())
    return torch.stack([x_MI[first:last].t() @ grad_MO[first:last] for first, last in pieces])


@opaque_grouped_mm.register_fake
def _fake_mm(x_MI: Tensor, w_nIO: Sequence[Tensor], start_n1: Tensor, whole: bool) -> Tensor:
    return x_MI.new_empty(x_MI.shape[0], w_nIO[0].shape[2])


@_grouped_outer.register_fake
def _fake_outer(x_MI: Tensor, grad_MO: Tensor, start_n1: Tensor) -> Tensor:
    return x_MI.new_empty(start_n1.shape[0] - 1, x_MI.shape[1], grad_MO.shape[1])


def _save(ctx: Any, inputs: tuple[Tensor, Sequence[Tensor], Tensor, bool], output: Tensor) -> None:
    x_MI, w_nIO, start_n1, ctx.whole = inputs
    ctx.save_for_backward(x_MI, start_n1, *w_nIO)


def _backward(ctx: Any, grad_MO: Tensor) -> tuple[Tensor | None, list[Tensor | None], None, None]:
    x_MI, start_n1, *w_nIO = ctx.saved_tensors
    grad_MO = grad_MO.contiguous()
    grad_x, grad_w, first = None, [], 0
    if ctx.needs_input_grad[0]:
        flipped = [w.transpose(1, 2) for w in w_nIO]
        grad_x = opaque_grouped_mm(grad_MO, flipped, start_n1, ctx.whole)
    for w, learns in zip(w_nIO, ctx.needs_input_grad[1], strict=True):
        last = first + w.shape[0]
        grad_w.append(_grouped_outer(x_MI, grad_MO, start_n1[first : last + 1]) if learns else None)
        first = last
    return grad_x, grad_w, None, None


opaque_grouped_mm.register_autograd(_backward, setup_context=_save)
