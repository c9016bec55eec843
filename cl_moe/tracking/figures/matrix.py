"""The accuracy matrix as a heat map and as curves.

Legend: T experiences, R (rows, T), row i: after i experiences (row 0: before any training).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cl_moe.stream import UNITS, Kind, is_loss
from cl_moe.tracking.figures import style
from cl_moe.tracking.names import stream_points
from cl_moe.tracking.record import Record


def accuracy_matrix(record: Record) -> Figure:
    """Heat map of R with its values: a row per point, the first before training, a column per experience.

    A line separates what was trained (below it) from what was not yet. Losses are shown as losses.
    """
    T = len(record.names)
    labels = 0.07 * max(len(style.shorten(name)) for name in record.names)
    inside = min(max(3.0, 0.52 * T), 12.0)
    width = inside + labels + 2.0
    figure = style.new_figure(width, min(max(3.6, 2.4 + 0.32 * T + labels / 2), 14))
    axes = figure.add_subplot()
    draw_matrix(axes, record.matrix.numpy(), record.kind)
    style.plain(axes)
    style.headline(figure, _headline(record), width)
    axes.set_xlabel("scored on", fontsize=9)
    style.experience_ticks(axes, record.names, inside)
    rows = ["before training", *(f"{i}: {style.shorten(name)}" for i, name in enumerate(record.names, 1))]
    step = -(-len(record.rows) // 40)
    axes.set_yticks(range(0, len(record.rows), step), rows[: len(record.rows)][::step], fontsize=8)
    axes.set_ylabel("after training on", fontsize=9)
    bar = figure.colorbar(axes.images[0], ax=axes, pad=0.02, fraction=0.05)
    bar.set_label(style.scale(record.kind).label, fontsize=9)
    bar.ax.tick_params(labelsize=8)
    return figure


def draw_matrix(
    axes: Axes, R: np.ndarray, kind: Kind, limits: tuple[float, float] | None = None, values: bool = True
) -> None:
    """Draw one matrix into ``axes``, with the staircase between trained and not yet trained.

    Args:
        axes: empty.
        R: (rows, T), higher is better.
        kind: of the stream.
        limits: of the colour scale, in shown units; None: as the kind says, or from the data.
        values: write the numbers into the cells, where there is room.
    """
    look = style.scale(kind)
    shown = look.sign * R
    low, high = limits or look.limits or (float(shown.min()), float(shown.max()) + 1e-9)
    axes.imshow(shown, cmap=look.colours, vmin=low, vmax=high, aspect="auto", interpolation="nearest")
    rows, T = R.shape
    if values and T <= 25:
        texts = [[f"{value:.2f}".removeprefix("0" if T > 12 else "") for value in row] for row in shown]
        style.cell_texts(axes, shown, texts, 8 if T <= 12 else 6.5)
    learnt = np.arange(min(rows - 1, T) + 1)
    axes.stairs(learnt[:-1] + 0.5, learnt - 0.5, baseline=None, color="white", lw=2)
    axes.set_xlim(-0.5, T - 0.5)
    axes.set_ylim(rows - 0.5, -0.5)


def forgetting_curves(record: Record) -> Figure:
    """A curve per experience over the number of experiences trained, the average, and what grew or froze.

    Dotted until the experience is trained, a dot at that point, solid from there on. The strip on top says
    how many experts (of all layers) were born and frozen at each boundary.
    """
    T, look = len(record.names), style.scale(record.kind)
    figure = style.new_figure(9.2, max(4.6, 2.0 + 0.2 * min(T, 24)))
    events = growth_events(record)
    if events:
        strip, axes = figure.subplots(2, 1, sharex=True, height_ratios=[1, 9])
        _draw_events(strip, events)
    else:
        axes = figure.add_subplot()
    style.headline(figure, _headline(record), 6.5)
    style.plain(axes)
    shown = look.sign * record.matrix.numpy()
    for i, (born, _) in events.items():
        if born:
            axes.axvline(i, color="#00664b", lw=1.2, alpha=0.35, zorder=0)
    _draw_curves(axes, shown, record.names)
    axes.set_xlabel("experiences trained", fontsize=9)
    axes.set_ylabel(look.label, fontsize=9)
    axes.set_xlim(-0.3, T + 0.3)
    axes.set_xticks(range(0, T + 1, -(-T // 25)))
    axes.grid(axis="x", color=style.RULE, lw=0.6)
    if not is_loss(record.kind):
        axes.set_ylim(-0.03, 1.03)
    handles, labels = axes.get_legend_handles_labels()
    keep = slice(None) if T <= 24 else slice(None, None, -(-T // 12))
    figure.legend(
        [handles[-1], *handles[:-1][keep]], [labels[-1], *labels[:-1][keep]], loc="outside right upper",
        fontsize=8, frameon=False, handlelength=1.6, labelspacing=0.35,
    )  # fmt: skip
    return figure


def growth_events(record: Record) -> dict[int, tuple[int, int]]:
    """``{i: (experts born, experts frozen)}`` at the boundary after i experiences, summed over layers."""
    events = {}
    for i, (before, after) in enumerate(zip(record.cohorts[:-1], record.cohorts[1:], strict=True)):
        born = frozen = 0
        for layer, members in after.items():
            known = before.get(layer, [])
            born += sum(size for size, _, _ in members[len(known) :])
            pairs = zip(known, members, strict=False)
            frozen += sum(new[0] for old, new in pairs if new[2] and not old[2])
        if born or frozen:
            events[i] = (born, frozen)
    return events


def seen_average(R: np.ndarray) -> np.ndarray:
    """(rows,) mean of R[i, j] over the experiences trained by row i; NaN in row 0."""
    means = [row[:i].mean() if i else np.nan for i, row in enumerate(R)]
    return np.array(means)


def _draw_curves(axes: Axes, shown: np.ndarray, names: Sequence[str]) -> None:
    """One curve per experience; the last one drawn is the average."""
    rows = len(shown)
    for j, (name, colour) in enumerate(zip(names, style.colours(len(names)), strict=True)):
        learnt = j + 1
        early, later = range(min(learnt + 1, rows)), range(learnt, rows)
        axes.plot(early, shown[: learnt + 1, j], color=colour, lw=0.9, ls=":", alpha=0.7)
        label = f"{learnt}: {style.shorten(name)}"
        axes.plot(later, shown[learnt:, j], color=colour, lw=1.6, label=label)
        axes.plot(later[:1], shown[learnt : learnt + 1, j], "o", color=colour, ms=5)
    axes.plot(range(rows), seen_average(shown), color="black", lw=2.6, label="average of those trained")


def _draw_events(strip: Axes, events: dict[int, tuple[int, int]]) -> None:
    """Numbers of experts born and frozen, above the boundaries at which it happened."""
    size = 8 if len(events) <= 12 else 6.5
    for i, (born, frozen) in events.items():
        if born:
            strip.text(
                i, 1, f"+{style.compact(born)}", ha="center", va="center", fontsize=size, color="#00664b"
            )
        if frozen:
            strip.text(i, 0, style.compact(frozen), ha="center", va="center", fontsize=size, color="#0072b2")
    strip.set_ylim(-0.6, 1.6)
    strip.set_yticks([0, 1], ["experts frozen", "experts born"], fontsize=8)
    strip.tick_params(length=0, labelbottom=False)
    strip.spines[:].set_visible(False)
    strip.grid(axis="x", color=style.RULE, lw=0.6)
    strip.set_axisbelow(True)


def _headline(record: Record) -> str:
    """The stream's numbers at the last point."""
    points = stream_points(record, record.experiences_trained)
    unit = f" {UNITS[record.kind].split(' per ')[0]}" if is_loss(record.kind) else ""
    named = [
        ("average accuracy", "stream/average_accuracy"),
        ("average loss", "stream/average_loss"),
        ("forgetting", "stream/forgetting"),
        ("backward transfer", "stream/backward_transfer"),
    ]
    known = [f"{words} {points[key]:.3f}{unit}" for words, key in named if key in points]
    trained = record.experiences_trained
    return f"After {trained} experience{'s' * (trained != 1)}: {', '.join(known) or 'nothing trained yet'}"
