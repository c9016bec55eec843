"""How several processes train one model: the ``engine`` of a trainer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from datetime import timedelta
from typing import Literal

from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch import nn

from cl_moe.errors import InputError

Device = Literal["cpu", "cuda"]
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
"""torch's process groups; what ranks agree on goes through the CPU everywhere."""


HELD = (
    *("naive", "joint", "cumulative", "replay", "der", "ewc", "si", "mas", "lwf", "gem", "agem", "gdumb"),
    *("icarl", "lifelong_moe", "sparse_memory"),
)
"""Strategies that were held against one process; others are refused among ranks until they are."""


class Engine(ABC):
    """One way of spreading training over ranks; each run has one, or none if it is one process."""

    @abstractmethod
    def strategy(self) -> Strategy:
        """Lightning's part of it, new."""

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
        if others := sorted(set(strategies) - set(HELD)):
            names = ", ".join(HELD)
            raise InputError(got=f"strategy={others[0]}", allowed=names, key=f"strategy {one}")
        if rows == "row":  # gradients of rows are not exchanged yet; auto is dense among ranks
            raise InputError(got="optimizer.rows=row", allowed="dense or auto", key=f"optimizer.rows {one}")
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


class DDP(Engine):
    """Distributed data parallelism: every rank holds the whole model and averages its gradients.

    Args:
        bucket_mb: gradients are exchanged in buckets of so many megabytes, above 0.
    """

    def __init__(self, bucket_mb: float = 25.0) -> None:
        if not isinstance(bucket_mb, int | float) or not bucket_mb > 0:
            raise InputError(
                got=f"bucket_mb={bucket_mb!r}", allowed="above 0", key="trainer.engine.bucket_mb"
            )
        self.bucket_mb = bucket_mb

    def strategy(self) -> Strategy:
        """Parameters that took no part in a step are looked for: experts that nobody chose.

        That also keeps torch from laying out its buckets anew after the first step, so that a run that goes
        on adds up in the order of one that was never stopped. Buffers are not sent: layers sum theirs.
        """
        return DDPStrategy(
            find_unused_parameters=True,
            forward_sync_buffers=False,
            bucket_cap_mb=self.bucket_mb,
            process_group_backend=BACKENDS["cpu"],  # the group that is there is taken
            timeout=timedelta(minutes=30),
        )
