"""Plain fine-tuning, the lower end of every comparison."""

from __future__ import annotations

from cl_moe.strategies.base import Strategy


class Naive(Strategy):
    """Trains on each experience as it comes and resists nothing."""

    reads_batches = True
