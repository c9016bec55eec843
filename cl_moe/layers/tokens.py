"""What a layer is given: checked, and as a flat list of tokens.

Legend: T tokens, D width.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from cl_moe.errors import InputError, RunFailedError


class Tokens(NamedTuple):
    """A layer's input as a flat list of tokens.

    Args:
        x: (T, D), 0 on padding.
        valid: (T,) bool, False on padding; None where there is none.
        group_size: tokens of one sequence; sequences follow each other.
    """

    x: Tensor
    valid: Tensor | None
    group_size: int


def flat_tokens(x: Tensor, mask: Tensor | None) -> Tokens:
    """Flatten (..., D); whatever stands on padding (even NaN) is replaced by 0."""
    group_size = max(x.shape[-2], 1) if x.dim() > 2 else 1
    if mask is None:
        return Tokens(x.reshape(-1, x.shape[-1]), None, group_size)
    valid_T = mask.reshape(-1)
    x_TD = x.reshape(-1, x.shape[-1]).masked_fill(~valid_T.unsqueeze(-1), 0.0)
    return Tokens(x_TD, valid_T, group_size)


def check_fits(x: Tensor, mask: Tensor | None, dim: int, like: Tensor) -> None:
    """Refuse shapes, dtypes and devices that would otherwise fail far from their cause.

    Half precision goes into a layer of float32 and back again, as under autocast; float64 is for a layer that
    is float64 as a whole.

    Args:
        x: what the layer is given.
        mask: of padding, or None.
        dim: width of the layer.
        like: one of the layer's weights, for device and dtype.
    """
    device = like.device
    if x.shape[-1:] != (dim,) or not x.is_floating_point():
        raise InputError(
            got=f"x of shape {tuple(x.shape)} and dtype {x.dtype}",
            allowed=f"a floating tensor of shape (..., {dim})",
            key="x (or the layer's dim)",
        )
    if x.device != device:
        raise InputError(
            got=f"x on {x.device}", allowed=f"{device}, where the layer's weights are", key="x (or layer.to)"
        )
    if (x.dtype == torch.float64) != (like.dtype == torch.float64):
        raise InputError(
            got=f"x of dtype {x.dtype} in a layer of {like.dtype}",
            allowed=f"{like.dtype}, or both float64",
            key="x (or layer.to)",
        )
    if mask is not None and (mask.shape != x.shape[:-1] or mask.dtype != torch.bool):
        raise InputError(
            got=f"mask of shape {tuple(mask.shape)} and dtype {mask.dtype}",
            allowed=f"a bool tensor of shape {tuple(x.shape[:-1])}",
            key="mask",
        )
    if mask is not None and mask.device != device:
        raise InputError(got=f"mask on {mask.device}", allowed=f"{device}, where x is", key="mask")


def check_finite(x: Tensor, mask: Tensor | None, layer: str) -> None:
    """Name tokens that are NaN or infinite, before a router chooses by them.

    One sum, on the CPU and outside of ``torch.compile`` only: elsewhere to read it would make every step
    wait for the device, or cut the graph; there a broken loss or output is all that tells.

    Raises:
        RunFailedError: how many tokens, and which is the first; padding does not count.
    """
    if not x.is_cpu or torch.compiler.is_compiling():
        return
    if math.isfinite(
        x.detach().sum(dtype=torch.float64 if x.dtype == torch.float64 else torch.float32).item()
    ):
        return
    broken_T = ~x.detach().isfinite().all(dim=-1).reshape(-1)  # a sum may overflow where no number is broken
    if mask is not None:
        broken_T &= mask.reshape(-1)
    if broken_T.any():
        first = int(broken_T.nonzero()[0])
        raise RunFailedError(
            f"{layer} was given {int(broken_T.sum())} of {broken_T.numel()} tokens that are not finite "
            f"(the first is token {first})\n"
            "change: what stands before the layer; while training optimizer.lr or trainer.gradient_clip"
        )
