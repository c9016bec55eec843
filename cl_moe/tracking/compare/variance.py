"""How much of an arm's variance comes from the order of the experiences, and how much from the seeds.

Legend: N cells, O orders, S seeds.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cl_moe.tracking.compare.statistics import Cells


class Components(NamedTuple):
    """Variance by source, in squared units of the metric; NaN where the runs cannot tell.

    Args:
        order: between orders of the experiences.
        seed: between seeds.
        rest: of one (order, seed) beside both: their interplay, and chance.
        clipped: the sources whose estimate was negative, which is given as 0.
    """

    order: float
    seed: float
    rest: float
    clipped: tuple[str, ...] = ()


def components(cells: Cells) -> Components:
    """Variance components of value = mean + order + seed + rest, all random, by the method of moments.

    The three sums of squares of Gao & Owen 2017 ("Efficient moment calculations for variance components in
    large unbalanced crossed random effects models", Electronic Journal of Statistics 11): within orders,
    within seeds, over all, set equal to their expectations. Unbiased before negative ones
    become 0, also for grids with gaps; on a full grid the estimates of the two-way analysis of variance.
    Needs two orders and two seeds that cross. With one order (or one seed) alone, the whole variance is
    ``seed`` (``order``), chance included, and the others are NaN.

    >>> components({(o, s): 10 * o + s for o in (0, 1) for s in (0, 1)})
    Components(order=50.0, seed=0.5, rest=0.0, clipped=())
    """
    nan = float("nan")
    orders, seeds = (list(dict.fromkeys(cell[axis] for cell in cells)) for axis in (0, 1))
    if len(cells) < 2:
        return Components(nan, nan, nan)
    if len(orders) == 1 or len(seeds) == 1:
        whole = float(np.var(list(cells.values()), ddof=1))
        return Components(nan, whole, nan) if len(orders) == 1 else Components(whole, nan, nan)
    o_N = np.array([orders.index(order) for order, _ in cells])
    s_N = np.array([seeds.index(seed) for _, seed in cells])
    y_N = np.array(list(cells.values()), dtype=np.float64)
    N, per_order, per_seed = len(y_N), np.bincount(o_N), np.bincount(s_N)
    within = [
        sum(((y_N[which == k] - y_N[which == k].mean()) ** 2).sum() for k in range(which.max() + 1))
        for which in (o_N, s_N)
    ]
    over_all = N * ((y_N - y_N.mean()) ** 2).sum()
    # rows: E of each sum of squares; columns: order, seed, rest
    expected = np.array(
        [
            [0, N - len(orders), N - len(orders)],
            [N - len(seeds), 0, N - len(seeds)],
            [N**2 - (per_order**2).sum(), N**2 - (per_seed**2).sum(), N**2 - N],
        ],
        dtype=np.float64,
    )
    if np.linalg.matrix_rank(expected) < 3:
        return Components(nan, nan, nan)
    found = np.linalg.solve(expected, np.array([*within, over_all]))
    found[np.abs(found) < 1e-12 * max(over_all, 1e-300)] = 0.0  # rounding is no negative variance
    clipped = tuple(name for name, value in zip(("order", "seed", "rest"), found, strict=True) if value < 0)
    order, seed, rest = (float(max(value, 0.0)) for value in found)
    return Components(order, seed, rest, clipped)


def worst_order(values: Cells, lower: bool) -> tuple[str, float] | None:
    """The order with the worst mean, and that mean; None if there are not two orders.

    >>> worst_order({("0", 1): 0.5, ("0", 2): 0.7, ("1", 1): 0.4}, lower=False)
    ('1', 0.4)
    """
    per_order: dict[str, list[float]] = {}
    for (order, _), value in values.items():
        per_order.setdefault(order, []).append(value)
    means = {order: sum(found) / len(found) for order, found in per_order.items()}
    if len(means) < 2:
        return None
    order = (max if lower else min)(means, key=lambda name: means[name])
    return order, means[order]
