"""Optimizers as the configuration names them: one class per YAML, built anew before each experience.

Each fit builds its optimizer from the parameters that learn then, so newborns are in and frozen ones are out.
Their state (momentum, moments) is carried over for survivors or starts afresh, as ``state`` says.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal, get_args

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from cl_moe.errors import InputError
from cl_moe.layers.tables import ExpertTable
from cl_moe.optim.anew import correct_steps
from cl_moe.optim.by_rows import ROW_POLICIES, ByRows
from cl_moe.optim.rules import AdagradRows, AdamRows, RowRule, SGDRows
from cl_moe.optim.state import Named

StatePolicy = Literal["carry", "reset"]


class OptimizerSpec(ABC):
    """How to build an optimizer for the parameters that learn in the next experience.

    Attributes:
        state: ``"carry"`` survivors' state over a boundary, or ``"reset"`` it there.
        rows: of the tables of product-key layers (see ``ByRows``): ``"row"``: only rows that a step touched
            learn in it; ``"dense"``: all do, as in any other parameter; ``"auto"``: what is cheaper.
    """

    state: str
    rows: str

    @abstractmethod
    def build(self, parameters: Named) -> torch.optim.Optimizer:
        """An optimizer over the named parameters; those that do not require gradients are left out."""

    def check(self) -> None:
        """Refuse an unknown state policy and a rate that is no rate."""
        if self.state not in get_args(StatePolicy):
            raise InputError(
                got=f"state={self.state!r}", allowed=", ".join(get_args(StatePolicy)), key="optimizer.state"
            )
        if self.rows not in ROW_POLICIES:
            raise InputError(got=f"rows={self.rows!r}", allowed=", ".join(ROW_POLICIES), key="optimizer.rows")
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
        self,
        lr: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        state: str = "reset",
        rows: str = "auto",
    ) -> None:
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.state, self.rows = state, rows
        self.check()

    def build(self, parameters: Named) -> torch.optim.Optimizer:
        """``torch.optim.SGD`` (fused, which torch has not for pieces of parameters) over what learns."""
        learning = [parameter for _, parameter in parameters if parameter.requires_grad]
        fused = not any(isinstance(parameter, DTensor) for parameter in learning)
        optimizer = torch.optim.SGD(
            learning, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay, fused=fused
        )
        if self.momentum:  # the fused step refuses newborns without a buffer beside survivors with theirs
            for parameter in learning:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return with_rows(optimizer, SGDRows(), self.rows)


class AdamW(OptimizerSpec):
    """Adam with decoupled weight decay, on matrices only: norms and biases (experts' too) are not decayed."""

    def __init__(
        self,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.01,
        eps: float = 1e-8,
        state: str = "reset",
        rows: str = "auto",
    ) -> None:
        self.lr, self.betas, self.weight_decay, self.eps = lr, tuple(betas), weight_decay, eps
        self.state, self.rows = state, rows
        self.check()

    def build(self, parameters: Named) -> torch.optim.Optimizer:
        """``torch.optim.AdamW`` (fused) over what learns, in two groups."""
        learning = [(name, parameter) for name, parameter in parameters if parameter.requires_grad]
        groups = [
            {"params": [p for name, p in learning if _is_matrix(name, p)], "weight_decay": self.weight_decay},
            {"params": [p for name, p in learning if not _is_matrix(name, p)], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=self.lr,
            betas=(self.betas[0], self.betas[1]),
            eps=self.eps,
            fused=True,
        )
        optimizer.register_step_post_hook(correct_steps)
        return with_rows(optimizer, AdamRows(), self.rows)


class Adagrad(OptimizerSpec):
    """Adagrad without decay; of the tables of product-key layers it remembers one number per row."""

    def __init__(self, lr: float, eps: float = 1e-10, state: str = "reset", rows: str = "auto") -> None:
        self.lr, self.eps, self.state, self.rows = lr, eps, state, rows
        self.check()

    def build(self, parameters: Named) -> torch.optim.Optimizer:
        """``torch.optim.Adagrad`` over what learns, and ``AdagradRows`` over tables."""
        learning = [parameter for _, parameter in parameters if parameter.requires_grad]
        tables = [parameter for parameter in learning if isinstance(parameter, ExpertTable)]
        others = [parameter for parameter in learning if not isinstance(parameter, ExpertTable)]
        whole = torch.optim.Adagrad(others, lr=self.lr, eps=self.eps) if others or not tables else None
        if whole is not None and not tables:
            return whole
        return ByRows(whole, AdagradRows(), tables, self.rows, {"lr": self.lr, "eps": self.eps})


def with_rows(optimizer: torch.optim.Optimizer, rule: RowRule, rows: str) -> torch.optim.Optimizer:
    """The optimizer itself where it holds no table; else one that steps rows by ``rule``."""
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    tables = [parameter for parameter in held if isinstance(parameter, ExpertTable)]
    return ByRows(optimizer, rule, tables, rows) if tables else optimizer


def _is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay is for it; the stacked biases of a cohort are biases all the same."""
    return parameter.ndim >= 2 and name.rpartition(".")[2] not in ("b_in", "b_out")
