"""Products of rows, sorted by expert, with their experts' matrices.

Legend: M rows, I inputs, O outputs, n experts, n1 = n + 1; m rows and i, o widths of one cohort.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from cl_moe.layers.reuse import Reused

_LARGE = 2**25  # bytes from which C's allocator asks the system for every block anew
_PART = 2**23  # bytes
_PIECE = 1024  # rows to which biases are added at once: their copies stay in a processor's cache


def grouped_linear(
    x_MI: Tensor, w_nIO: Tensor, b_nO: Tensor | None, start_n1: Tensor, memory: Reused | None = None
) -> Tensor:
    """(M, O): every row times its expert's matrix, plus its bias.

    What is not to be changed keeps nothing for the backward pass, and the bias is added where the product
    stands: fresh memory costs a CPU about as much as what is written there.

    Args:
        x_MI: (M, I), rows of expert e at ``start_n1[e] : start_n1[e + 1]``.
        w_nIO: (n, I, O), of the same dtype.
        b_nO: (n, O), of the same dtype, or None.
        start_n1: (n + 1,) int64, from 0 to M.
        memory: where the gradient of the matrices stands, if it is large.
    """
    return _Linear.apply(x_MI, w_nIO, b_nO, start_n1, memory)


def grouped_relu_ffn(
    x_MI: Tensor,
    w_nIH: Tensor,
    b_nH: Tensor | None,
    w_nHO: Tensor,
    b_nO: Tensor | None,
    start_n1: Tensor,
    memories: tuple[Reused, Reused],
) -> Tensor:
    """(M, O): two maps with a ReLU between them, the bits of two ``grouped_linear``.

    As one operation it owns what stands between the maps: the ReLU is taken where biases are added, and its
    gradient where that of the outer map stands, so that neither costs a pass through fresh memory.

    Args:
        x_MI: (M, I), rows of expert e at ``start_n1[e] : start_n1[e + 1]``.
        w_nIH: (n, I, H), of the same dtype, as all others are.
        b_nH: (n, H) or None.
        w_nHO: (n, H, O).
        b_nO: (n, O) or None.
        start_n1: (n + 1,) int64, from 0 to M.
        memories: where the gradients of both matrices stand, if they are large.
    """
    return _ReluFFN.apply(x_MI, w_nIH, b_nH, w_nHO, b_nO, start_n1, memories)


def grouped_mm(x_MI: Tensor, w_nIO: Tensor, start_n1: Tensor) -> Tensor:
    """(M, O): every row times its expert's matrix, not yet with a derivative of its own.

    Args:
        x_MI: (M, I), M > 0; rows of expert e at ``start_n1[e] : start_n1[e + 1]``.
        w_nIO: (n, I, O), of the same dtype.
        start_n1: (n + 1,) int64, from 0 to M.
    """
    if _stock_serves(w_nIO):
        return nn.functional.grouped_mm(x_MI, w_nIO, offs=start_n1[1:].int())
    return looped_mm(x_MI, w_nIO, start_n1)


def grouped_outer(x_MI: Tensor, grad_MO: Tensor, start_n1: Tensor, memory: Reused | None = None) -> Tensor:
    """(n, I, O): for every expert the sum of its rows' outer products; 0 for one without rows.

    Where that is large, and there is memory for it, it is put together from pieces that stay in a cache.
    """
    n, num_in, num_out = start_n1.numel() - 1, x_MI.shape[1], grad_MO.shape[1]
    if x_MI.shape[0] == 0:
        return x_MI.new_zeros(n, num_in, num_out)
    if not _stock_serves(grad_MO.new_empty(0, num_in, num_out)):
        return looped_outer(x_MI, grad_MO, start_n1)
    expert_bytes = num_in * num_out * grad_MO.element_size()
    if memory is None or not x_MI.is_cpu or n * expert_bytes < _LARGE:
        return nn.functional.grouped_mm(x_MI.t(), grad_MO, offs=start_n1[1:].int())
    outer_nIO, step = memory.empty((n, num_in, num_out), grad_MO), max(1, _PART // expert_bytes)
    for first in range(0, n, step):
        own_n1 = start_n1[first : first + step + 1]
        begin, end = own_n1[[0, -1]].tolist()
        part = x_MI[begin:end], grad_MO[begin:end], own_n1 - begin
        outer_nIO[first : first + step] = grouped_outer(*part)
    return outer_nIO


def looped_mm(x_MI: Tensor, w_nIO: Tensor, start_n1: Tensor) -> Tensor:
    """What ``F.grouped_mm`` computes, one expert after the other: for what it refuses, and for tests."""
    bounds = start_n1.tolist()
    return torch.cat([x_MI[bounds[e] : bounds[e + 1]] @ w_nIO[e] for e in range(w_nIO.shape[0])])


def looped_outer(x_MI: Tensor, grad_MO: Tensor, start_n1: Tensor) -> Tensor:
    """``grouped_outer``, one expert after the other."""
    pieces = pairwise(start_n1.tolist())
    return torch.stack([x_MI[first:last].t() @ grad_MO[first:last] for first, last in pieces])


def _stock_serves(w_nIO: Tensor) -> bool:
    """``F.grouped_mm`` wants rows of whole 16 bytes, and no float64."""
    if w_nIO.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    return all(width * w_nIO.element_size() % 16 == 0 for width in w_nIO.shape[1:])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_MI: Tensor, w_nIO: Tensor, b_nO: Tensor | None, start_n1: Tensor, memory: Reused | None
    ) -> Tensor:
        x_learns, w_learns, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x_MI if w_learns else None, w_nIO if x_learns else None, start_n1)
        ctx.memory = memory
        return _map(x_MI, w_nIO, b_nO, start_n1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_MO: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        x_MI, w_nIO, start_n1 = ctx.saved_tensors
        learns = ctx.needs_input_grad[:3]
        return *_gradients(grad_MO.contiguous(), x_MI, w_nIO, start_n1, learns, ctx.memory), None, None


class _ReluFFN(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_MI: Tensor,
        w_nIH: Tensor,
        b_nH: Tensor | None,
        w_nHO: Tensor,
        b_nO: Tensor | None,
        start_n1: Tensor,
        memories: tuple[Reused, Reused],
    ) -> Tensor:
        x_learns, w_learns, b_learns, outer_learns, *_ = ctx.needs_input_grad
        ctx.memories, below = memories, x_learns or w_learns or b_learns
        hidden_MH = _map(x_MI, w_nIH, b_nH, start_n1, relu=True)
        ctx.save_for_backward(
            x_MI if w_learns else None,
            w_nIH if x_learns else None,
            hidden_MH if below or outer_learns else None,
            w_nHO if below else None,
            start_n1,
        )
        return _map(hidden_MH, w_nHO, b_nO, start_n1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_MO: Tensor) -> tuple[Tensor | None, ...]:
        x_MI, w_nIH, hidden_MH, w_nHO, start_n1 = ctx.saved_tensors
        inner, outer = ctx.needs_input_grad[:3], (w_nHO is not None, *ctx.needs_input_grad[3:5])
        grad_MO, (memory_in, memory_out) = grad_MO.contiguous(), ctx.memories
        grad_MH, *of_outer = _gradients(grad_MO, hidden_MH, w_nHO, start_n1, outer, memory_out)
        if grad_MH is None:
            return None, None, None, *of_outer, None, None
        torch.ops.aten.threshold_backward.grad_input(grad_MH, hidden_MH, 0, grad_input=grad_MH)
        return *_gradients(grad_MH, x_MI, w_nIH, start_n1, inner, memory_in), *of_outer, None, None


def _map(x_MI: Tensor, w_nIO: Tensor, b_nO: Tensor | None, start_n1: Tensor, relu: bool = False) -> Tensor:
    """(M, O): every row times its expert's matrix, plus its bias, then 0 for what is negative, if asked."""
    if x_MI.shape[0] == 0:
        return x_MI.new_zeros(0, w_nIO.shape[2])
    out_MO = grouped_mm(x_MI, w_nIO, start_n1)
    if b_nO is None:
        return out_MO.relu_() if relu else out_MO
    expert_n = torch.arange(w_nIO.shape[0], device=x_MI.device)
    expert_M = expert_n.repeat_interleave(start_n1.diff(), output_size=x_MI.shape[0])
    piece = _PIECE if x_MI.is_cpu else x_MI.shape[0]
    for out_mO, expert_m in zip(out_MO.split(piece), expert_M.split(piece), strict=True):
        out_mO += b_nO.index_select(0, expert_m)
        if relu:
            out_mO.relu_()
    return out_MO


def _gradients(
    grad_MO: Tensor,
    x_MI: Tensor,
    w_nIO: Tensor,
    start_n1: Tensor,
    learns: tuple[bool, bool, bool],
    memory: Reused | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of a map's rows, matrices and biases, each where it learns."""
    return (
        _map(grad_MO, w_nIO.transpose(1, 2), None, start_n1) if learns[0] else None,
        grouped_outer(x_MI, grad_MO, start_n1, memory) if learns[1] else None,
        _sum_of_rows(grad_MO, start_n1) if learns[2] else None,
    )


def _sum_of_rows(grad_MO: Tensor, start_n1: Tensor) -> Tensor:
    """(n, O): every expert's rows added up, in their order."""
    if grad_MO.shape[0] == 0:
        return grad_MO.new_zeros(start_n1.numel() - 1, grad_MO.shape[1])
    row_M = torch.arange(grad_MO.shape[0], device=grad_MO.device)
    return nn.functional.embedding_bag(row_M, grad_MO, start_n1, mode="sum", include_last_offset=True)


# ``torch.compile`` cannot see into the product (it knows F.grouped_mm in bfloat16 alone, and a loop would
# have to read the groups' sizes), so compiled code calls it, and its gradients, as operators of one piece.


@torch.library.custom_op("cl_moe::grouped_mm", mutates_args=())
def opaque_grouped_mm(x_MI: Tensor, w_nIO: Sequence[Tensor], start_n1: Tensor, whole: bool) -> Tensor:
    """``grouped_mm`` over several cohorts as one operator; matrices that do not learn cost no gradient.

    The matrices stay where they are: no copy of all experts is made. A cohort may be narrower than others: it
    reads the first inputs of its rows only, and its further outputs are 0.

    Args:
        x_MI: (M, I), I that of the widest cohort.
        w_nIO: the experts' matrices cohort by cohort, (n, i, o) together.
        start_n1: (n + 1,) int64.
        whole: whether every row is some expert's. Else those behind the last group are 0 and cost nothing.
    """
    width = max(w.shape[2] for w in w_nIO)
    outs = []
    for w, rows, own_n1 in _by_cohort(w_nIO, start_n1, whole):
        x_mi = x_MI[rows, : w.shape[1]].contiguous()
        if x_mi.shape[0]:
            out_mo = grouped_mm(x_mi, w, own_n1)
            outs.append(nn.functional.pad(out_mo, (0, width - w.shape[2])) if w.shape[2] < width else out_mo)
    num_rows = sum(out.shape[0] for out in outs)
    if num_rows < x_MI.shape[0] or not outs:
        outs.append(x_MI.new_zeros(x_MI.shape[0] - num_rows, width))
    return outs[0] if len(outs) == 1 else torch.cat(outs)


@torch.library.custom_op("cl_moe::grouped_outer", mutates_args=())
def opaque_grouped_outer(x_MI: Tensor, grad_MO: Tensor, start_n1: Tensor) -> Tensor:
    """``grouped_outer`` of the cohort whose rows lie from the first to the last of ``start_n1``."""
    first, last = start_n1[[0, -1]].tolist()
    return grouped_outer(x_MI[first:last].contiguous(), grad_MO[first:last].contiguous(), start_n1 - first)


def _by_cohort(
    w_nIO: Sequence[Tensor], start_n1: Tensor, whole: bool
) -> Iterator[tuple[Tensor, slice, Tensor]]:
    """Each cohort's matrices, its rows, and where its experts start among them.

    A GPU is waited for to know where cohorts end, except if there is one alone that takes every row.
    """
    if whole and len(w_nIO) == 1:
        yield w_nIO[0], slice(None), start_n1
        return
    edges = [0, *accumulate(w.shape[0] for w in w_nIO)]
    bounds = start_n1[torch.tensor(edges, device=start_n1.device)].tolist()
    for w, (first, last), (begin, end) in zip(w_nIO, pairwise(edges), pairwise(bounds), strict=True):
        yield w, slice(begin, end), start_n1[first : last + 1] - begin


@opaque_grouped_mm.register_fake
def _fake_mm(x_MI: Tensor, w_nIO: Sequence[Tensor], start_n1: Tensor, whole: bool) -> Tensor:
    return x_MI.new_empty(x_MI.shape[0], max(w.shape[2] for w in w_nIO))


@opaque_grouped_outer.register_fake
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
        (n, num_in, num_out), own_n1 = w.shape, start_n1[first : first + w.shape[0] + 1]
        first += n
        x_Mi, grad_Mo = x_MI[:, :num_in], grad_MO[:, :num_out]
        grad_w.append(opaque_grouped_outer(x_Mi, grad_Mo, own_n1) if learns else None)
    return grad_x, grad_w, None, None


opaque_grouped_mm.register_autograd(_backward, setup_context=_save)
