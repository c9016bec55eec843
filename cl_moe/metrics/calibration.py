"""How sure a classifier is, and how often right, folded batch by batch, summed over ranks.

Legend: T experiences, B examples of a batch, M bins of confidence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from cl_moe.metrics.functional.calibration import NUM_BINS, binned_calibration_error, calibration_bins


class CalibrationErrors(Metric):
    """Expected calibration error on every experience's evaluation data (see ``calibration_error``).

    Sums over bins are kept, so batches of any size and order give the same, and ranks add up.

    Args:
        num_experiences: T.
    """

    full_state_update = False
    higher_is_better = False
    is_differentiable = False
    sums: Tensor

    def __init__(self, num_experiences: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_experiences = num_experiences
        zeros_TM3 = torch.zeros(num_experiences, NUM_BINS, 3, dtype=torch.float64)
        self.add_state("sums", zeros_TM3, dist_reduce_fx="sum")

    def update(self, experience: int, confidence: Tensor, right: Tensor) -> None:
        """Fold one batch in.

        Args:
            experience: index of the experience that the batch belongs to.
            confidence: (B,) probability of the answer given.
            right: (B,) bool.
        """
        self.sums[experience] += calibration_bins(confidence, right).to(self.sums.device)

    def compute(self) -> Tensor:
        """(T,) float64 in [0, 1]; NaN for an experience of which nothing was answered."""
        return binned_calibration_error(self.sums)

    def _wrap_compute(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        """One entry per experience also at T = 1."""
        wrapped = super()._wrap_compute(compute)
        return lambda *args, **kwargs: wrapped(*args, **kwargs).reshape(self.num_experiences)
