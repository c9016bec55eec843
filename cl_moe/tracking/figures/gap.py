"""What old experiences lose and win back between two boundaries: the stability gap.

Legend: T experiences, n points of a curve.
"""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cl_moe.stream import is_loss
from cl_moe.tracking.figures import style
from cl_moe.tracking.figures.matrix import growth_events
from cl_moe.tracking.record import Record


def stability_gap(record: Record) -> Figure | None:
    """A curve per experience over optimizer steps, from its own training on; boundaries, births, freezes.

    Between boundaries the scores are those of a subset of the test data; a dot is a row of the matrix, on
    all of them. Dotted while the experience itself is trained. None where nothing was evaluated in between.
    """
    if not record.anytime:
        return None
    T, look = len(record.names), style.scale(record.kind)
    figure = style.new_figure(9.2, max(4.6, 2.0 + 0.2 * min(T, 24)))
    axes = figure.add_subplot()
    style.headline(figure, "Scores inside experiences: the gap behind each boundary", 9.2)
    style.plain(axes)
    for j, colour in enumerate(style.colours(T)):
        _draw_curve(axes, record, j, colour)
    _draw_boundaries(axes, record)
    axes.set_xlabel("optimizer steps", fontsize=9)
    axes.set_ylabel(look.label, fontsize=9)
    if not is_loss(record.kind):
        axes.set_ylim(-0.03, 1.03)
    handles, labels = axes.get_legend_handles_labels()
    keep = slice(None) if T <= 24 else slice(None, None, -(-T // 12))
    figure.legend(handles[keep], labels[keep], loc="outside right upper", fontsize=8, frameon=False)
    return figure


def curve(record: Record, j: int) -> tuple[np.ndarray, np.ndarray]:
    """(n,) steps and (n,) scores R of experience j: rows from the one before its training on, and between."""
    points = [(record.steps[i], record.rows[i][j].item()) for i in range(j, len(record.rows))]
    for e, (steps, scores) in record.anytime.items():
        if e >= j:
            points += zip(steps.tolist(), scores[:, j].tolist(), strict=True)
    steps_n, scores_n = zip(*sorted(points), strict=True)
    return np.array(steps_n), np.array(scores_n)


def _draw_curve(axes: Axes, record: Record, j: int, colour: str | tuple[float, ...]) -> None:
    sign = style.scale(record.kind).sign
    steps, scores = curve(record, j)
    learnt = record.steps[j + 1] if j + 1 < len(record.steps) else record.steps[-1]
    own, later = steps <= learnt, steps >= learnt
    axes.plot(steps[own], sign * scores[own], color=colour, lw=0.9, ls=":", alpha=0.7)
    label = f"{j + 1}: {style.shorten(record.names[j])}"
    axes.plot(steps[later], sign * scores[later], color=colour, lw=1.2, label=label)
    rows = [(record.steps[i], sign * record.rows[i][j].item()) for i in range(j + 1, len(record.rows))]
    if rows:
        axes.plot(*zip(*rows, strict=True), "o", color=colour, ms=4)


def _draw_boundaries(axes: Axes, record: Record) -> None:
    """A line at every boundary, with the experts born and frozen there."""
    events = growth_events(record)
    for i, step in enumerate(record.steps):
        axes.axvline(step, color=style.RULE, lw=0.8, zorder=0)
        born, frozen = events.get(i, (0, 0))
        words = [f"+{style.compact(born)}"] * bool(born) + [f"{style.compact(frozen)} frozen"] * bool(frozen)
        if words:
            axes.annotate(
                "\n".join(words), (step, 1.0), xycoords=("data", "axes fraction"), xytext=(2, -2),
                textcoords="offset points", va="top", fontsize=7, color=style.MUTED,
            )  # fmt: skip
