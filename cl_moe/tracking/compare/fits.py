"""Curves through points: pure functions on plain numbers.

Legend: P points.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cl_moe.errors import InputError

EXPONENTS = np.geomspace(0.02, 4.0, 400)
"""Exponents that ``power`` tries, about 1.3% apart."""


class Fit(NamedTuple):
    """A curve.

    Args:
        values: what it says, by name.
        x: (P,) where it was computed, ascending.
        y: (P,) there.
    """

    values: dict[str, float]
    x: np.ndarray
    y: np.ndarray


def slope(x: Sequence[float], y: Sequence[float]) -> Fit:
    """The line of least squares through y over log2 x: ``slope`` is what a doubling of x brings.

    >>> slope([1, 2, 4, 8], [5.0, 4.0, 3.0, 2.0]).values
    {'slope': -1.0}
    """
    x_P, y_P = _points(x, y, 2)
    line = np.polynomial.Polynomial.fit(np.log2(x_P), y_P, 1)
    grid = _grid(x_P)
    found = float(line.convert().coef[1]) if len(line.convert().coef) > 1 else 0.0
    return Fit({"slope": round(found, 12)}, grid, line(np.log2(grid)))


def parabola(x: Sequence[float], y: Sequence[float]) -> Fit:
    """The parabola of least squares through y over ln x, as isoFLOP curves are drawn (2203.15556, fig. 3).

    ``best`` is its lowest value in the range of x that was measured, ``at`` the x there: the vertex, or an
    end of the range if the vertex lies outside or the curve bends down. What lies beyond was not measured.

    >>> {name: round(value, 6) for name, value in parabola([1, 10, 100], [2.0, 1.0, 2.0]).values.items()}
    {'best': 1.0, 'at': 10.0}
    """
    x_P, y_P = _points(x, y, 3)
    curve = np.polynomial.Polynomial.fit(np.log(x_P), y_P, 2)
    ends = np.log([x_P.min(), x_P.max()])
    roots = [root.real for root in curve.deriv().roots() if ends[0] < root.real < ends[1]]
    places = np.array([*ends, *roots])
    lowest = places[np.argmin(curve(places))]
    grid = _grid(x_P)
    return Fit({"best": float(curve(lowest)), "at": float(np.exp(lowest))}, grid, curve(np.log(grid)))


def power(x: Sequence[float], y: Sequence[float]) -> Fit:
    """y = floor + scale / x^exponent by least squares, exponent in ``EXPONENTS``, scale >= 0.

    With all but one variable of a scaling law held still it is the law in the other one: of granularity, say
    (Krajewski et al. 2024, 2402.07871, equation 9). ``residual`` is the root of the mean squared residual,
    ``explained`` 1 minus its square over the variance of y. Where y does not fall, both scale and exponent
    are 0.

    >>> law = power([1, 2, 4, 8], [3.0, 2.0, 1.5, 1.25]).values
    >>> round(law["floor"], 1), round(law["scale"], 1), round(law["exponent"], 1)
    (1.0, 2.0, 1.0)
    """
    x_P, y_P = _points(x, y, 3)
    best: tuple[float, float, float, float] | None = None
    for exponent in EXPONENTS:
        falls = x_P**-exponent
        spread = falls - falls.mean()
        scale = max(0.0, float(spread @ (y_P - y_P.mean()) / (spread @ spread)))
        floor = float(y_P.mean() - scale * falls.mean())
        error = float(((floor + scale * falls - y_P) ** 2).mean())
        if best is None or error < best[0]:
            best = (error, floor, scale, float(exponent))
    assert best is not None
    error, floor, scale, exponent = best
    variance = float(y_P.var())
    values = {
        "floor": floor,
        "scale": scale,
        "exponent": exponent if scale > 0 else 0.0,
        "residual": error**0.5,
        "explained": 1 - error / variance if variance > 0 else float("nan"),
    }
    grid = _grid(x_P)
    return Fit(values, grid, floor + scale * grid**-exponent)


def first_reaching(steps: Sequence[float], losses: Sequence[float], level: float) -> float | None:
    """The first step at which a loss curve is at the level or below, on the line between two points.

    None if it never is.

    >>> first_reaching([10, 20, 30], [3.0, 2.0, 1.0], 1.5), first_reaching([10, 20], [3.0, 2.0], 1.5)
    (25.0, None)
    """
    for index, loss in enumerate(losses):
        if loss <= level:
            if index == 0:
                return float(steps[0])
            before, step = steps[index - 1], steps[index]
            return float(before + (step - before) * (losses[index - 1] - level) / (losses[index - 1] - loss))
    return None


def _points(x: Sequence[float], y: Sequence[float], least: int) -> tuple[np.ndarray, np.ndarray]:
    x_P, y_P = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    different = len(np.unique(x_P))
    if x_P.shape != y_P.shape or different < least or x_P.min() <= 0:
        raise InputError(
            got=f"{different} different x of {len(x_P)} points",
            allowed=f"at least {least} different x above 0, a y each",
            key="Derive",
        )
    return x_P, y_P


def _grid(x_P: np.ndarray) -> np.ndarray:
    return np.geomspace(x_P.min(), x_P.max(), 50)
