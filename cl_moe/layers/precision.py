"""Which precision a part computes in, and the activations by name."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from cl_moe.errors import InputError

Activation = Callable[[Tensor], Tensor]


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU approximated with tanh (1606.08415, section 2): GPT-2's ``gelu_new``."""
    return nn.functional.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Activation] = {
    "relu": nn.functional.relu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": gelu_tanh,
    "silu": nn.functional.silu,
}


def activation_by_name(name: str) -> Activation:
    """The function called ``name``."""
    if name not in ACTIVATIONS:
        raise InputError(got=f"activation={name}", allowed=" or ".join(ACTIVATIONS), key="layer.activation")
    return ACTIVATIONS[name]


def in_place(activation: Activation) -> Activation:
    """The same, put where its input stands, if its gradient does not need that; for fresh tensors only."""
    return torch.relu_ if activation is nn.functional.relu else activation


def wide(x: Tensor) -> Tensor:
    """At least float32: what routers compute in, whatever the experts do (2101.03961, section 2.4)."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def matmul_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of a matrix product with ``weight``: autocast's where it is on: it knows no grouped_mm."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def no_autocast(x: Tensor) -> torch.autocast:
    """A region in which autocast leaves dtypes alone."""
    return torch.autocast(x.device.type, enabled=False)
