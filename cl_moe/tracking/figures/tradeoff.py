"""What an arm paid for what: learning against forgetting, and what forgot, weights or routing.

Everything here takes plain numbers. Legend: S runs of an arm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from cl_moe.stream import Kind, is_loss
from cl_moe.tracking.figures import style

Points = Mapping[str, Sequence[tuple[float, float]]]


def pareto(arms: Points, kind: Kind = "classification") -> Figure:
    """Learning against forgetting: a small dot per run, a large one for an arm's mean; the front is a line.

    On the front are the arms' means that no other mean beats in both: no other learns at least as well and
    forgets at most as much, and one of the two more so.

    Args:
        arms: ``{arm: [(learning accuracy, or learning loss; forgetting) of each run]}``.
        kind: of the stream; says which way learning counts.
    """
    shown = {arm: np.array(points, dtype=float) for arm, points in arms.items() if len(points)}
    if not shown:
        return style.page("No run has both learning and forgetting:\na stream of one experience has neither.")
    looks = style.line_styles(arms)
    figure = style.new_figure(7.5, 4.6 + 0.2 * -(-len(shown) // 2))
    axes = figure.add_subplot()
    for arm, points_S2 in shown.items():
        colour = looks[arm][0]
        axes.plot(*points_S2.T, "o", color=colour, ms=4, alpha=0.45, mew=0)
        marker = "os^D"[style.LINES.index(looks[arm][1])]
        axes.plot(*points_S2.mean(axis=0), marker, color=colour, ms=10, mec="white", label=arm)
    means = np.array([points_S2.mean(axis=0) for points_S2 in shown.values()])
    front = means[on_front(means, 1 if is_loss(kind) else -1)]
    front = front[np.argsort(front[:, 0])]
    axes.plot(*front.T, color=style.MUTED, lw=1, ls="--", zorder=0)
    style.plain(axes, "Learning against forgetting (the front, dashed, is not beaten in both)")
    better = "lower" if is_loss(kind) else "higher"
    axes.set_xlabel(
        f"{style.scale(kind).label.split(' (')[0]} just after learning ({better} is better)", fontsize=9
    )
    axes.set_ylabel("forgetting (lower is better)", fontsize=9)
    axes.grid(color=style.RULE, lw=0.5)
    figure.legend(loc="outside lower left", ncols=2, fontsize=8.5, frameon=False)
    return figure


def on_front(means: np.ndarray, learning: int) -> np.ndarray:
    """Which rows (learning, forgetting) no other row beats, (A,) bool; ``learning`` -1: more is better.

    >>> on_front(np.array([[0.9, 0.1], [0.8, 0.2], [0.95, 0.3]]), -1).tolist()
    [True, False, True]
    """
    cost = means * np.array([learning, 1])
    beaten = [any((other <= one).all() and (other < one).any() for other in cost) for one in cost]
    return ~np.array(beaten, dtype=bool)


def forgetting_parts(arms: Mapping[str, tuple[float, float]], unit: str) -> Figure:
    """Forgetting (just after learning minus the end) of every arm, split into weights and routing, as bars.

    Args:
        arms: ``{arm: (by weights, by routing)}``, means; either may be negative.
        unit: of forgetting.
    """
    if not arms:
        return style.page("No run measured what forgot, weights or routing.")
    looks = {"weights": style.PALETTE[0], "routing (and new classes)": style.PALETTE[1]}
    figure = style.new_figure(8, 1.6 + 0.42 * len(arms))
    axes = figure.add_subplot()
    places = np.arange(len(arms))
    for part, (name, colour) in enumerate(looks.items()):
        values = [both[part] for both in arms.values()]
        axes.barh(places + 0.19 * (2 * part - 1), values, height=0.36, color=colour, label=name)
    sums = [sum(both) for both in arms.values()]
    axes.plot(sums, places, "|", color=style.INK, ms=18, mew=2, label="sum: minus backward transfer")
    axes.set_yticks(places, [style.shorten(arm, 34) for arm in arms], fontsize=8.5)
    axes.invert_yaxis()
    axes.axvline(0, color=style.MUTED, lw=0.8)
    style.plain(axes, "What forgot")
    axes.set_xlabel(f"forgetting ({unit})", fontsize=9)
    axes.grid(axis="x", color=style.RULE, lw=0.5)
    figure.legend(loc="outside lower left", ncols=3, fontsize=8.5, frameon=False)
    return figure
