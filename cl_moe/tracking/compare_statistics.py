"""The statistics of a comparison: pure functions on plain numbers."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np


class Spread(NamedTuple):
    """Mean and sample standard deviation (n - 1) of n values; ``std`` is NaN for one value, both for none."""

    mean: float
    std: float
    num: int


class Difference(NamedTuple):
    """Mean of n paired differences and its confidence interval; NaN where n is too small to have one."""

    mean: float
    low: float
    high: float
    pairs: int


def spread(values: Sequence[float]) -> Spread:
    """Mean, sample standard deviation and number of the values.

    >>> spread([1.0, 2.0, 3.0])
    Spread(mean=2.0, std=1.0, num=3)
    """
    x = np.asarray(values, dtype=np.float64)
    mean = float(x.mean()) if x.size else float("nan")
    return Spread(mean, float(x.std(ddof=1)) if x.size > 1 else float("nan"), x.size)


def paired_difference(
    ours: Mapping[Hashable, float], baseline: Mapping[Hashable, float], confidence: float = 0.95
) -> Difference:
    """Ours minus baseline over the keys (stream and seeds) that both have, with Student's t interval.

    The interval is that of a paired t test: it takes the differences for normally distributed, and needs two
    of them. Differences that are all the same give an interval of width 0.

    Args:
        ours: ``{pair: value}``.
        baseline: ``{pair: value}``.
        confidence: 0 < c < 1, probability that such an interval covers the true mean difference.

    >>> paired_difference({1: 3.0, 2: 4.0, 3: 9.0}, {1: 2.0, 2: 3.0})
    Difference(mean=1.0, low=1.0, high=1.0, pairs=2)
    """
    x = np.array(
        [value - baseline[pair] for pair, value in ours.items() if pair in baseline], dtype=np.float64
    )
    mean, std, count = spread(x.tolist())
    if count < 2:
        return Difference(mean, float("nan"), float("nan"), count)
    from scipy import special

    # Student's t quantile: scipy.stats.t.ppf without its slow import
    half = float(special.stdtrit(count - 1, (1 + confidence) / 2)) * std / count**0.5
    return Difference(mean, mean - half, mean + half, count)
