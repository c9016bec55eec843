"""How many floating-point operations torch's operators take, and a mode that adds them up as they run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten
Formula = Callable[..., int]


def _grouped_mm(a: Tensor, b: Tensor, *rest: Any, out: Tensor, **options: Any) -> int:
    """Rows of each group times the group's matrix; or, as its gradient, an outer product for each group."""
    if a.dim() == 2 and b.dim() == 2:
        return 2 * a.numel() * b.shape[1]
    return 2 * out.numel() * a.shape[-1]


def _embedding_bag(
    table: Tensor,
    index: Tensor,
    offsets: Tensor,
    scale_grad: bool = False,
    mode: int = 0,
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    *rest: Any,
    out: Any,
) -> int:
    """Weighted sums of rows; without weights nothing is multiplied."""
    return 0 if per_sample_weights is None else 2 * index.numel() * table.shape[1]


def _sampled_addmm(pattern: Tensor, a: Tensor, b: Tensor, *, out: Tensor, **options: Any) -> int:
    """A dot product for every place of the pattern."""
    return 2 * int(pattern._nnz()) * a.shape[-1]


def _attention(q: Tensor, k: Tensor, v: Tensor, *rest: Any, out: Any, **options: Any) -> int:
    return sdpa_flop_count(q.shape, k.shape, v.shape)


def _attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any, out: Any, **options: Any
) -> int:
    return sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape)


def _dot(a: Tensor, b: Tensor, *, out: Tensor) -> int:
    return 2 * a.numel()


def _addmv(added: Tensor, a: Tensor, b: Tensor, *, out: Tensor, **options: Any) -> int:
    return 2 * a.numel()


def _addr(added: Tensor, a: Tensor, b: Tensor, *, out: Tensor, **options: Any) -> int:
    return 2 * a.numel() * b.numel()


def _distance(a: Tensor, b: Tensor, *rest: Any, out: Tensor) -> int:
    return 2 * out.numel() * a.shape[-1]


FORMULAS: Mapping[Any, Formula] = {
    aten._grouped_mm: _grouped_mm,
    aten._embedding_bag: _embedding_bag,
    aten._embedding_bag_forward_only: _embedding_bag,
    aten.sparse_sampled_addmm: _sampled_addmm,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    aten.mv: _dot,
    aten.dot: _dot,
    aten.vdot: _dot,
    aten.addmv: _addmv,
    aten.addr: _addr,
    aten._cdist_forward: _distance,
}
"""What torch's own table (``torch.utils.flop_counter``: products, convolutions, attention) does not know."""

_WHOLE: set[Any] = set()  # operators that are no composition of others; to ask each time is slow


class CountFlops(TorchDispatchMode):
    """Counts the floating-point operations of what runs inside it, on this thread and in its backward passes.

    A multiplication with its addition counts as two. Counted are products of matrices and vectors,
    convolutions, attention (in full, whether causal or not; a flash kernel's backward pass with the scores
    that it computes anew), the grouped products of experts, and the sparse dot products and weighted sums of
    retrieved experts. What runs is counted, so that what is frozen, dropped or not asked for costs nothing,
    and what activation checkpointing computes again costs twice. Not counted: what works element by element
    (activations, softmax, norms, losses, optimizers), sums, comparisons (top-k, sorting), copies; and
    what stands inside ``torch.compile``.

    The operators themselves run unchanged, so that no bit of a result depends on being counted. It is slow
    (several microseconds for each operator): see ``Charges``.

    Attributes:
        total: operations so far.

    >>> with CountFlops() as count:
    ...     _ = torch.ones(2, 3) @ torch.ones(3, 5)
    >>> count.total
    60
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operator, and add what it takes."""
        kwargs = kwargs or {}
        packet = func._overloadpacket
        own, stock = FORMULAS.get(packet), flop_registry.get(packet)
        if own is None and stock is None and func not in _WHOLE:
            with self:  # in inference mode compositions arrive whole
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
            _WHOLE.add(func)
        out = func(*args, **kwargs)
        if own is not None:
            self.total += own(*args, **kwargs, out=out)
        elif stock is not None:
            self.total += stock(*args, **kwargs, out_val=out)
        return out
