"""How much longer the most loaded expert works than the mean one, folded batch by batch, summed over ranks.

Legend: T experiences, N experts of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from cl_moe.layers.routing import ExpertLoad
from cl_moe.metrics.functional.load import max_violation


class PeakLoads(Metric):
    """Sums of max_i c_i / mean c over batches, and the number of batches, by block and experience.

    Experts that work side by side wait for the one that has most to do, so the quotient stands for the
    latency of a step, in units of an even load (the argument of Expert Choice, 2202.09368). c counts routed
    slots, those that a capacity drops included. A batch is one of evaluation, ``trainer.eval_batch_size``
    examples of one experience; the last may be smaller. A batch of which nothing was routed is left out.

    Args:
        num_experiences: T.
    """

    full_state_update = False
    is_differentiable = False

    def __init__(self, num_experiences: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_experiences = num_experiences
        self.blocks: list[int] = []

    def update(self, experience: int, loads: Mapping[int, ExpertLoad]) -> None:
        """Fold one batch in: ``{block: fold_load(routing)}``."""
        for block, load in loads.items():
            if block not in self.blocks:
                zeros_T2 = torch.zeros(self.num_experiences, 2, dtype=torch.float64, device=load.count.device)
                self.add_state(f"sums_{block}", zeros_T2, dist_reduce_fx="sum")
                self.blocks.append(block)
            quotient = max_violation(load.count) + 1
            found = torch.stack([quotient, torch.ones_like(quotient)])
            getattr(self, f"sums_{block}")[experience] += torch.where(quotient.isnan(), 0.0, found)

    def compute(self) -> dict[int, Tensor]:
        """``{block: (T, 2) float64}``: sum of the quotients, number of batches."""
        return {block: getattr(self, f"sums_{block}").clone() for block in self.blocks}

    def _wrap_compute(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        """(T, 2) also at T = 1."""
        wrapped = super()._wrap_compute(compute)
        return lambda *args, **kwargs: {
            block: sums.reshape(self.num_experiences, 2) for block, sums in wrapped(*args, **kwargs).items()
        }
