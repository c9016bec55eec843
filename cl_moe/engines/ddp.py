"""Data parallelism with the whole model on every rank."""

from __future__ import annotations

from datetime import timedelta

from lightning.pytorch.strategies import DDPStrategy, Strategy

from cl_moe.engines.base import BACKENDS, Device, Engine
from cl_moe.errors import InputError


class DDP(Engine):
    """Distributed data parallelism: every rank holds the whole model and averages its gradients.

    Args:
        bucket_mb: gradients are exchanged in buckets of so many megabytes, above 0.
    """

    held = (
        *("naive", "joint", "cumulative", "replay", "der", "ewc", "si", "mas", "lwf", "gem", "agem", "gdumb"),
        *("icarl", "lifelong_moe", "sparse_memory"),
    )

    def __init__(self, bucket_mb: float = 25.0) -> None:
        if not isinstance(bucket_mb, int | float) or not bucket_mb > 0:
            raise InputError(
                got=f"bucket_mb={bucket_mb!r}", allowed="above 0", key="trainer.engine.bucket_mb"
            )
        self.bucket_mb = bucket_mb

    def strategy(self, device: Device) -> Strategy:
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
