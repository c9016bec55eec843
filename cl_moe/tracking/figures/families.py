"""Curves through arms (isoFLOP curves, trends, laws), losses over steps, old losses over new ones.

Everything here takes plain numbers. Legend: P points.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cl_moe.tracking.figures import style

if TYPE_CHECKING:
    from cl_moe.tracking.compare.families import Family


def families(found: Sequence[Family]) -> Figure:
    """A dot per run, and the curve through the arms' means; x is logarithmic."""
    figure, axes = _empty(len(found))
    looks = style.line_styles([one.name for one in found])
    for one in found:
        colour, dashes = looks[one.name]
        points_P2 = np.array(one.points)
        axes.plot(*points_P2.T, "o", color=colour, ms=3, alpha=0.4, mew=0)
        axes.plot(one.curve.x, one.curve.y, dashes, color=colour, lw=1.4, label=one.name)
    axes.set_xscale("log")
    return _labelled(figure, axes, "Curves through the arms: dots are runs", found[0].over, found[0].metric)


def learning(arms: Mapping[str, Sequence[tuple[Sequence[float], Sequence[float]]]]) -> Figure:
    """The loss over optimizer steps: a thin line per run, a thick one for the mean of an arm.

    Args:
        arms: ``{arm: [(steps, losses) of each run]}``; runs of an arm with the same steps have a mean.
    """
    figure, axes = _empty(len(arms))
    for name, (colour, dashes) in style.line_styles(arms).items():
        for steps, losses in arms[name]:
            axes.plot(steps, losses, dashes, color=colour, lw=0.6, alpha=0.35)
        steps, alike = (
            arms[name][0][0],
            [losses for s, losses in arms[name] if list(s) == list(arms[name][0][0])],
        )
        axes.plot(steps, np.mean(alike, axis=0), dashes, color=colour, lw=1.8, label=name)
    return _labelled(
        figure, axes, "Loss while learning, on held-out data", "optimizer steps", "loss (minus the score)"
    )


def trade(arms: Mapping[str, Sequence[tuple[Sequence[float], Sequence[float]]]]) -> Figure:
    """The loss on what is old over that on what is new, while the new is learned; lower left is better.

    A thin line per run, a thick one for the mean of an arm's runs, its end marked.

    Args:
        arms: ``{arm: [(losses on the newest, losses on older ones) of each run]}``, as many of each run.
    """
    figure, axes = _empty(len(arms))
    for name, (colour, dashes) in style.line_styles(arms).items():
        for newest, older in arms[name]:
            axes.plot(newest, older, dashes, color=colour, lw=0.6, alpha=0.35)
        mean_2P = np.mean([run for run in arms[name] if len(run[0]) == len(arms[name][0][0])], axis=0)
        axes.plot(*mean_2P, dashes, color=colour, lw=1.8, label=name)
        axes.plot(*mean_2P[:, -1:], "o", color=colour, ms=5)
    return _labelled(
        figure,
        axes,
        "What learning the last experience costs the older ones: dots are ends",
        "loss on the last experience (minus the score)",
        "mean loss on older ones",
    )


def _empty(num_curves: int) -> tuple[Figure, Axes]:
    """With room below for a legend of so many curves."""
    figure = style.new_figure(7.5, 4.6 + 0.2 * -(-num_curves // 3))
    return figure, figure.add_subplot()


def _labelled(figure: Figure, axes: Axes, title: str, x: str, y: str) -> Figure:
    style.plain(axes, title)
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.grid(color=style.RULE, lw=0.5)
    figure.legend(loc="outside lower left", ncols=3, fontsize=8.5, frameon=False)
    return figure
