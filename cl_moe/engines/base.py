"""How several processes train one model: the ``engine`` of a trainer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, Literal

from lightning.pytorch.plugins.precision import DoublePrecision
from lightning.pytorch.strategies import Strategy
from torch import nn

from cl_moe.errors import InputError

Device = Literal["cpu", "cuda"]
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
"""torch's process groups; what ranks agree on goes through the CPU everywhere."""


class Engine(ABC):
    """One way of spreading training over ranks; each run has one, or none if it is one process.

    Attributes:
        held: strategies against forgetting that were held against one process under it; others are refused
            until they are.
        precisions: numbers that it computes in.
        rows: ways in which tables of experts may learn.
    """

    held: tuple[str, ...]
    rows: tuple[str, ...] = ("auto", "dense")
    precisions: tuple[str, ...] = ("32-true", "bf16-mixed", "64-true")

    @abstractmethod
    def strategy(self, device: Device) -> Strategy:
        """Lightning's part of it, new."""

    def check_start(self, num_ranks: int) -> None:
        """Refuse a number of ranks that is none for it, or that a package is missing; by default nothing."""
        return None

    def precision(self, name: str, device: Device) -> dict[str, Any]:
        """Lightning's arguments for numbers of this kind.

        In float64 by a plugin, since by its name Lightning keeps it from sharding, which can do it.
        """
        return {"plugins": [DoublePrecision()]} if name == "64-true" else {"precision": name}

    def check(
        self, model: nn.Module, strategies: Iterable[str], rows: str, open_stream: bool, flops: float | None
    ) -> None:
        """Refuse what several ranks would do wrongly.

        Args:
            model: fresh.
            strategies: names of the run's.
            rows: how tables of experts are to learn.
            open_stream: whether data may arrive while the run goes on.
            flops: bound of its operations.

        Raises:
            InputError: names the part.
        """
        one = "(or trainer.devices)"
        if others := sorted(set(strategies) - set(self.held)):
            names = ", ".join(self.held)
            raise InputError(got=f"strategy={others[0]}", allowed=names, key=f"strategy {one}")
        if rows not in self.rows:  # auto is dense among ranks
            allowed = " or ".join(self.rows)
            raise InputError(got=f"optimizer.rows={rows}", allowed=allowed, key=f"optimizer.rows {one}")
        if open_stream:
            raise InputError(got="an open stream", allowed="one that is whole", key=f"stream {one}")
        if flops is not None:
            raise InputError(got=f"budget.flops={flops:g}", allowed="null", key=f"budget.flops {one}")
        for name, part in model.named_modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.track_running_stats:
                raise InputError(
                    got=f"{name}, a {type(part).__name__} whose statistics every rank would keep for itself",
                    allowed="models without torch's batch normalisation (layers of cl_moe sum theirs)",
                    key=f"model {one}",
                )
