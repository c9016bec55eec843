"""Optimizers as the configuration names them: one class per YAML, built anew before each experience.

Each fit builds its optimizer from the parameters that learn then, so newborns are in and frozen ones are out.
Their state (momentum, moments) is carried over for survivors or starts afresh, as ``state`` says.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from cl_moe.errors import InputError

Named = Iterable[tuple[str, nn.Parameter]]
OptimizerState = dict[str, dict[str, Any]]
StatePolicy = Literal["carry", "reset"]


class OptimizerSpec(ABC):
    """How to build an optimizer for the parameters that learn in the next experience.

    Attributes:
        state: ``"carry"`` survivors' state over a boundary, or ``"reset"`` it there.
    """

    state: str

    @abstractmethod
    def build(self, parameters: Named) -> torch.optim.Optimizer:
        """An optimizer over the named parameters; those that do not require gradients are left out."""

    def check(self) -> None:
        """Refuse an unknown state policy and a rate that is no rate."""
        if self.state not in get_args(StatePolicy):
            raise InputError(
                got=f"state={self.state!r}", allowed=", ".join(get_args(StatePolicy)), key="optimizer.state"
            )
        lr = getattr(self, "lr", None)
        if not isinstance(lr, (int, float)) or not lr > 0:
            raise InputError(got=f"lr={lr!r}", allowed="a number above 0", key="optimizer.lr")
        for name in ("momentum", "weight_decay", "eps"):
            value = getattr(self, name, 0.0)
            if not isinstance(value, (int, float)) or not value >= 0:
                raise InputError(got=f"{name}={value!r}", allowed="a number >= 0", key=f"optimizer.{name}")
        betas = getattr(self, "betas", (0.0, 0.0))
        if len(betas) != 2 or not all(isinstance(beta, (int, float)) and 0 <= beta < 1 for beta in betas):
            raise InputError(
                got=f"betas={list(betas)}", allowed="two numbers, each 0 <= beta < 1", key="optimizer.betas"
            )


class SGD(OptimizerSpec):
    """Stochastic gradient descent; weight decay on all parameters, as torch has it."""

    def __init__(
        self, lr: float, momentum: float = 0.0, weight_decay: float = 0.0, state: str = "reset"
    ) -> None:
        self.lr, self.momentum, self.weight_decay, self.state = lr, momentum, weight_decay, state
        self.check()

    def build(self, parameters: Named) -> torch.optim.Optimizer:
        """``torch.optim.SGD`` (fused) over what learns."""
        learning = [parameter for _, parameter in parameters if parameter.requires_grad]
        optimizer = torch.optim.SGD(
            learning, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay, fused=True
        )
        if self.momentum:  # the fused step refuses newborns without a buffer beside survivors with theirs
            for parameter in learning:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer


class AdamW(OptimizerSpec):
    """Adam with decoupled weight decay, on matrices only: norms and biases (experts' too) are not decayed."""

    def __init__(
        self,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.01,
        eps: float = 1e-8,
        state: str = "reset",
    ) -> None:
        self.lr, self.betas, self.weight_decay, self.eps = lr, tuple(betas), weight_decay, eps
        self.state = state
        self.check()

    def build(self, parameters: Named) -> torch.optim.Optimizer:
        """``torch.optim.AdamW`` (fused) over what learns, in two groups."""
        learning = [(name, parameter) for name, parameter in parameters if parameter.requires_grad]
        groups = [
            {"params": [p for name, p in learning if _is_matrix(name, p)], "weight_decay": self.weight_decay},
            {"params": [p for name, p in learning if not _is_matrix(name, p)], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=self.lr,
            betas=(self.betas[0], self.betas[1]),
            eps=self.eps,
            fused=True,
        )


def _is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay is for it; the stacked biases of a cohort are biases all the same."""
    return parameter.ndim >= 2 and name.rpartition(".")[2] not in ("b_in", "b_out")


def state_by_name(optimizer: torch.optim.Optimizer, parameters: Named) -> OptimizerState:
    """An optimizer's state keyed by parameter name: a key that survives growth."""
    return {name: dict(optimizer.state[p]) for name, p in parameters if p in optimizer.state}


def load_state_by_name(
    optimizer: torch.optim.Optimizer, parameters: Named, state: Mapping[str, Mapping[str, Any]]
) -> None:
    """Give survivors their state back; newborns start without one. Tensors are copied, not shared."""
    held = {p for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in parameters:
        if parameter in held and name in state:
            optimizer.state[parameter] = {
                key: value.clone() if isinstance(value, Tensor) else value
                for key, value in state[name].items()
            }
