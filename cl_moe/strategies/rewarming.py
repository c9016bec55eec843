"""Learning-rate re-warming (Gupta et al. 2023, "How to (re)warm your model?", 2308.04014)."""

from __future__ import annotations

import math

from cl_moe.errors import InputError
from cl_moe.strategies.base import Outlook, Strategy
from cl_moe.strategies.teacher import check_weight


class Rewarming(Strategy):
    """In every experience the learning rate rises to its peak again, and then falls along a cosine.

    With ``W = warmup * steps``, the factor on ``optimizer.lr`` is ``peak * t / W`` in step t = 1 .. W, and
    then ``floor + (peak - floor) * (1 + cos(pi (t - W) / (steps - W))) / 2`` (section 3). The first
    experience stands for pre-training and has a peak of 1; a ``peak`` below 1 for the later ones gives up
    some of the new for the old. It hangs on the number of the step alone.

    Args:
        warmup: share of an experience's steps in which the rate rises, in [0, 1).
        peak: highest factor from the second experience on, > 0.
        floor: factor at the end of an experience, in [0, peak].
    """

    computes = False
    reads_batches = True

    def __init__(self, warmup: float = 0.01, peak: float = 1.0, floor: float = 0.1) -> None:
        if not isinstance(warmup, int | float) or not 0 <= warmup < 1:
            key = "strategy.rewarming.warmup"
            raise InputError(got=f"warmup={warmup!r}", allowed="a share of the steps, in [0, 1)", key=key)
        check_weight(peak, "strategy.rewarming.peak", above=True)
        check_weight(floor, "strategy.rewarming.floor")
        if floor > min(peak, 1.0):
            allowed = f"at most {min(peak, 1.0)}, the lowest peak"
            raise InputError(got=f"floor={floor}", allowed=allowed, key="strategy.rewarming.floor")
        self.warmup, self.peak, self.floor = warmup, peak, floor
        self._first = True

    def begin(self, outlook: Outlook) -> None:
        """Whether this is the first experience."""
        self._first = outlook.experience.index == 0

    def rate(self, step: int, num_steps: int) -> float:
        """The factor of the step after ``step`` others of ``num_steps``.

        >>> [round(Rewarming(0.5, floor=0.0).rate(step, 4), 3) for step in range(4)]
        [0.5, 1.0, 0.5, 0.0]
        """
        peak, at, rising = 1.0 if self._first else self.peak, step + 1, self.warmup * num_steps
        if at <= rising:
            return peak * at / rising
        along = (at - rising) / (num_steps - rising)
        return self.floor + (peak - self.floor) * (1 + math.cos(math.pi * along)) / 2
