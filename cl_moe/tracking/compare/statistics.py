"""The statistics of a comparison: pure functions on plain numbers, seeded where they draw.

Legend: P pairs, O orders, S seeds, B resamples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from cl_moe.errors import InputError

Cells = Mapping[Any, float]
"""``{(order, seed): value}``, orders and seeds of whatever kind that can be hashed."""

FEW_PAIRS = 8
"""Below so many pairs, orders or seeds a bootstrap is too narrow, and Student's interval is shown."""
_EXACT = 16  # so many pairs have 65,536 signs: all are tried


class Spread(NamedTuple):
    """Mean and sample standard deviation (n - 1) of n values; ``std`` is NaN for one value, both for none."""

    mean: float
    std: float
    num: int


class Interval(NamedTuple):
    """Ends of a confidence interval; NaN where there is too little to have one."""

    low: float
    high: float


class Inference(NamedTuple):
    """How sure a difference is made.

    Args:
        interval: the one that tables show, ``"bootstrap"`` or ``"t"``; files have both. Of fewer than
            ``FEW_PAIRS`` levels Student's is shown whatever is asked for.
        resamples: of the bootstrap, and of the permutation test where not all signs can be tried; >= 100.
        confidence: 0 < c < 1.
        seed: of what is drawn.
    """

    interval: str = "bootstrap"
    resamples: int = 10_000
    confidence: float = 0.95
    seed: int = 0

    def check(self) -> None:
        """Refuse values out of range.

        Raises:
            InputError: with the option to change.
        """
        if self.interval not in ("bootstrap", "t"):
            raise InputError(got=f"{self.interval!r}", allowed="bootstrap or t", key="--interval")
        if not 100 <= self.resamples <= 1_000_000:
            raise InputError(got=f"{self.resamples}", allowed="100 to 1000000", key="--resamples")
        if not 0 < self.confidence < 1:
            raise InputError(got=f"{self.confidence}", allowed="between 0 and 1", key="--confidence")


class Contrast(NamedTuple):
    """An arm minus the baseline over P pairs.

    Args:
        mean: of the differences; NaN without a pair.
        pairs: P.
        shown: the interval that tables show, one of the next two; NaN for a single pair.
        bootstrap: ``bootstrap_interval``.
        student: ``student_interval``.
        p: two-sided: of ``sign_flip_test``, or, where orders and seeds cross, of ``student_interval``.
        p_holm: the same, adjusted for the number of arms by ``holm``.
        levels: of the axis that has fewer, orders or seeds; P where they do not cross.
        resampled: ``shown`` is the bootstrap.
    """

    mean: float
    pairs: int
    shown: Interval
    bootstrap: Interval
    student: Interval
    p: float
    p_holm: float
    levels: int = 0
    resampled: bool = False

    @property
    def few(self) -> bool:
        """Too few levels for a bootstrap: ``shown`` takes their means for normal."""
        return self.levels < FEW_PAIRS


_NOTHING = Interval(float("nan"), float("nan"))


def spread(values: Sequence[float]) -> Spread:
    """Mean, sample standard deviation and number of the values.

    >>> spread([1.0, 2.0, 3.0])
    Spread(mean=2.0, std=1.0, num=3)
    """
    x = np.asarray(values, dtype=np.float64)
    mean = float(x.mean()) if x.size else float("nan")
    return Spread(mean, float(x.std(ddof=1)) if x.size > 1 else float("nan"), x.size)


def contrast(ours: Cells, baseline: Cells, how: Inference) -> Contrast:
    """Ours minus baseline over the (order, seed) that both have; ``p_holm`` is ``p`` as yet.

    Of a grid, signs of one axis leave out the variance of the other (at .05, 14 x 14 equal arms would be told
    apart in .11 of the samples), so p is Student's, which holds both: at most .05 from 2 x 2 to 14 x 14.

    >>> contrast({(0, 1): 3.0, (0, 2): 4.0, (0, 3): 9.0}, {(0, 1): 2.0, (0, 2): 3.0}, Inference())[:3]
    (1.0, 2, Interval(low=1.0, high=1.0))
    """
    cells = {pair: value - baseline[pair] for pair, value in ours.items() if pair in baseline}
    axes = level_means(cells)
    levels = min(map(len, axes))
    p = sign_flip_test(axes[0], how.resamples, how.seed) if len(axes) == 1 else student_p(cells)
    bootstrap, student = bootstrap_interval(cells, how), student_interval(cells, how.confidence)
    resampled = how.interval == "bootstrap" and levels >= FEW_PAIRS
    shown = bootstrap if resampled else student
    mean = spread(list(cells.values())).mean
    return Contrast(mean, len(cells), shown, bootstrap, student, p, p, levels, resampled)


def level_means(cells: Cells) -> list[list[float]]:
    """The values that may be taken for independent, a list for every axis that must be looked at.

    Runs that share an order, or a seed, are not independent. With two or more of both, the means of the
    orders are one list and the means of the seeds the other: within each, no two values have a level of that
    axis in common. Where one axis has a single level, or every order has a seed of its own, the values
    themselves are the only list.

    >>> level_means({(o, s): 10.0 * o + s for o in (0, 1) for s in (0, 1, 2)})
    [[1.0, 11.0], [5.0, 6.0, 7.0]]
    """
    orders, seeds = (list(dict.fromkeys(cell[axis] for cell in cells)) for axis in (0, 1))
    if min(len(orders), len(seeds)) < 2 or len(orders) == len(seeds) == len(cells):
        return [list(cells.values())]
    return [
        [spread([value for cell, value in cells.items() if cell[axis] == level]).mean for level in levels]
        for axis, levels in enumerate((orders, seeds))
    ]


def student_interval(cells: Cells, confidence: float = 0.95) -> Interval:
    """Student's interval of the mean over cells (order, seed): takes levels' means for normal; needs two.

    Where orders and seeds do not cross, that of a paired t test. Where they do, each axis gives the half
    width of a t test on its ``level_means``, and the root of the sum of the two squares is taken. What is
    left beside both is counted twice, so it errs to the wide side (as two-way clustering without its third
    term: Cameron, Gelbach & Miller 2011, "Robust Inference With Multiway Clustering", Journal of Business &
    Economic Statistics 29(2), section 2).

    >>> student_interval({(0, 1): 1.0, (0, 2): 1.0})
    Interval(low=1.0, high=1.0)
    """
    mean, _, count = spread(list(cells.values()))
    if count < 2:
        return _NOTHING
    half = _half_width([spread(axis) for axis in level_means(cells)], confidence)
    return Interval(mean - half, mean + half)


def student_p(cells: Cells) -> float:
    """Two-sided p of a mean of 0: one minus the confidence at which ``student_interval`` ends at 0.

    Where orders and seeds do not cross, that of a paired t test.

    >>> round(student_p({(0, 1): 1.0, (0, 2): 3.0, (0, 3): 2.0}), 4)
    0.0742
    """
    mean, _, count = spread(list(cells.values()))
    if count < 2:
        return float("nan")
    spreads = [spread(axis) for axis in level_means(cells)]
    low, high = 0.0, 1.0
    for _ in range(52):  # so many bits has 1 - p
        p = (low + high) / 2
        low, high = (p, high) if _half_width(spreads, 1 - p) >= abs(mean) else (low, p)
    return high


def bootstrap_interval(cells: Cells, how: Inference) -> Interval:
    """A bootstrap interval of the mean over cells (order, seed), whose rows and columns go together.

    Two runs with the same order, or with the same seed, are not independent, so orders and seeds are drawn
    anew, each with replacement, and a cell counts as often as its order times its seed was drawn: the
    pigeonhole bootstrap (Owen 2007, "The pigeonhole bootstrap", Annals of Applied Statistics 1(2)). It errs
    to the wide side. An axis with one level stays as it is; where every order has a seed of its own, pairs
    are drawn (Efron's bootstrap). Resamples without a cell (in a grid with gaps) do not count.

    The ends are expanded percentiles (Hesterberg 2015, "What Teachers Should Know About the Bootstrap", The
    American Statistician 69(4)): the percentiles at Phi(-+ sqrt(n / (n - 1)) t), n the levels of
    the shortest axis drawn, since plain ones are too narrow for small n.

    Args:
        cells: of differences.
        how: resamples, confidence, seed.

    >>> bootstrap_interval({(0, seed): 2.0 for seed in range(3)}, Inference())
    Interval(low=2.0, high=2.0)
    """
    if len(cells) < 2:
        return _NOTHING
    orders, seeds = (list(dict.fromkeys(cell[axis] for cell in cells)) for axis in (0, 1))
    if len(orders) == len(seeds) == len(cells):  # one to one
        cells, orders = {(None, pair): value for pair, value in cells.items()}, [None]
        seeds = [seed for _, seed in cells]
    value_OS, there_OS = np.zeros((2, len(orders), len(seeds)))
    for (order, seed), value in cells.items():
        place = orders.index(order), seeds.index(seed)
        value_OS[place], there_OS[place] = value, 1
    # Sums over a mean of zero keep equal differences equal to the last bit.
    centre = float(np.mean(list(cells.values())))
    value_OS = (value_OS - centre) * there_OS
    draw = np.random.default_rng(how.seed)
    weight_BO, weight_BS = (_counts(draw, how.resamples, num) for num in value_OS.shape)
    num_B = ((weight_BO @ there_OS) * weight_BS).sum(axis=1)
    sum_B = ((weight_BO @ value_OS) * weight_BS).sum(axis=1)
    mean_B = centre + sum_B[num_B > 0] / num_B[num_B > 0]
    levels = min(num for num in value_OS.shape if num > 1)
    low, high = np.quantile(mean_B, expanded(levels, how.confidence))
    return Interval(float(low), float(high))


def expanded(num: int, confidence: float) -> tuple[float, float]:
    """The quantiles whose bootstrap interval is about as wide as Student's for ``num`` normal values.

    >>> [round(q, 4) for q in expanded(1000, 0.95)]
    [0.0248, 0.9752]
    """
    from scipy import special

    low = float(special.ndtr(-((num / (num - 1)) ** 0.5) * _t_quantile(num, confidence)))
    return low, 1 - low


def sign_flip_test(differences: Sequence[float], resamples: int = 10_000, seed: int = 0) -> float:
    """Two-sided p of a mean difference, if in every pair the two arms could as well change places.

    The paired permutation test (Fisher 1935, The Design of Experiments, section 21): the share of all 2^P
    choices of signs whose sum is at least as far from 0. Exact up to 16 pairs; beyond, so many draws and (b +
    1) / (m + 1) (Phipson & Smyth 2010). With P pairs it cannot be below 2 / 2^P: five pairs never give less
    than .0625. The differences must be independent: of a grid, ``level_means``.

    >>> sign_flip_test([1.0, 2.0, 3.0])
    0.25
    """
    x_P = np.asarray(differences, dtype=np.float64)
    if x_P.size == 0:
        return float("nan")
    least = abs(x_P.sum()) - 1e-12 * np.abs(x_P).sum()  # equal sums in another order of addition
    if x_P.size <= _EXACT:
        signs = 1 - 2 * ((np.arange(2**x_P.size)[:, None] >> np.arange(x_P.size)) & 1)
        return float((np.abs(signs @ x_P) >= least).mean())
    signs = np.random.default_rng(seed).choice(np.array([-1, 1], np.int8), (resamples, x_P.size))
    return float((1 + (np.abs(signs @ x_P) >= least).sum()) / (1 + resamples))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number by Holm (1979): reject where one is at most alpha.

    The chance of any false rejection stays at most alpha, whatever the tests have in common. NaN is no test.

    >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    p = np.asarray(p_values, dtype=np.float64)
    tests = np.flatnonzero(~np.isnan(p))
    order = tests[np.argsort(p[tests], kind="stable")]
    adjusted = p.copy()
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * factors))
    return [float(value) for value in adjusted]


def _counts(draw: np.random.Generator, resamples: int, levels: int) -> np.ndarray:
    """How often each level is drawn, (B, levels); an axis of one level stays as it is."""
    return draw.multinomial(levels, np.full(levels, 1 / levels), resamples).astype(np.float64)


def _half_width(spreads: Sequence[Spread], confidence: float) -> float:
    """Root of the sum of the squared half widths of t tests on several axes."""
    halves = (_t_quantile(num, confidence) * std / num**0.5 if std else 0.0 for _, std, num in spreads)
    return float(np.hypot.reduce(list(halves)))


def _t_quantile(count: int, confidence: float) -> float:
    """Student's t quantile of n - 1 degrees: scipy.stats.t.ppf without its slow import."""
    from scipy import special

    return float(special.stdtrit(count - 1, (1 + confidence) / 2))
