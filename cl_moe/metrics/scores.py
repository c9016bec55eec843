"""Scores of an evaluation, folded batch by batch and summed over ranks.

Legend: T experiences.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from cl_moe.errors import InputError


class ExperienceScores(Metric):
    """Mean score on every experience's evaluation data: one row of the accuracy matrix.

    Sums and counts are kept, never means, so batches of any size, merged states and ranks with different
    numbers of examples all weigh every example (or token) once.

    Args:
        num_experiences: T.

    Raises:
        InputError: T below 1.
    """

    full_state_update = False
    higher_is_better = True
    is_differentiable = False
    score_sum: Tensor
    count: Tensor

    def __init__(self, num_experiences: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if num_experiences < 1:
            raise InputError(got=str(num_experiences), allowed="at least 1", key="num_experiences")
        self.num_experiences = num_experiences
        self.add_state("score_sum", torch.zeros(num_experiences, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(num_experiences, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, experience: int, score_sum: Tensor | float, count: Tensor | int) -> None:
        """Fold one batch in.

        Args:
            experience: index of the experience that the batch belongs to.
            score_sum: () sum of the batch's scores: number of correct answers, or minus the summed loss.
            count: () examples (or tokens) summed over; padding left out.

        Raises:
            InputError: no such experience.
        """
        if not 0 <= experience < self.num_experiences:
            raise InputError(
                got=f"experience {experience}", allowed=f"0 .. {self.num_experiences - 1}", key="experience"
            )
        self.score_sum[experience] += score_sum
        self.count[experience] += count

    def compute(self) -> Tensor:
        """(T,) float64 means; NaN for an experience of which nothing was seen."""
        return self.score_sum / self.count  # 0 / 0 is NaN

    def _wrap_compute(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        """A row has one entry per experience also at T = 1, where torchmetrics would squeeze it to 0-d."""
        wrapped = super()._wrap_compute(compute)
        return lambda *args, **kwargs: wrapped(*args, **kwargs).reshape(self.num_experiences)
