"""Sums over the ranks of a distributed run; without one, nothing happens."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_group: dist.ProcessGroup | None = None
_size: int | None = None


def use_group(group: dist.ProcessGroup | None, size: int | None = None) -> None:
    """Let sums go over this group; None: over the default one, as long as none was named.

    A run whose gradients are averaged during the backward pass (DDP) needs one for these sums alone: the two
    are then never waited for in another order on another rank.

    Args:
        group: of ranks that compute different rows of a batch.
        size: how many these are; None: all.
    """
    global _group, _size
    _group, _size = group, size


def group() -> dist.ProcessGroup | None:
    """The group of layers' own; None: the default one."""
    return _group


def num_ranks() -> int:
    """Ranks of the run that compute different rows of a batch; 1 without a run of several."""
    if _size is not None:
        return _size
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def several_ranks() -> bool:
    """Whether other ranks run beside this one."""
    return num_ranks() > 1


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of every rank's ``x``, on every rank; differentiable, right where ranks average gradients.

    Every rank must call it the same number of times, so layers do so only while training.
    """
    return x if num_ranks() == 1 else _SumOverRanks.apply(x)


def part_of_mean(mean: Tensor, count: Tensor | int) -> Tensor:
    """A rank's part of a mean over the items of all ranks: the ranks' average of it is that mean.

    Args:
        mean: over this rank's items; finite where there are none.
        count: how many these are.
    """
    if num_ranks() == 1:
        return mean
    count = torch.as_tensor(count, device=mean.device).to(torch.float64)
    share = count * num_ranks() / sum_over_ranks(count).clamp_min(1.0)
    return mean * share.to(mean.dtype)


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x, group=_group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # every rank's loss depends on every rank's x: the same sum again
        grad = grad.clone()
        dist.all_reduce(grad, group=_group)
        return grad
