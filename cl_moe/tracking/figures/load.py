"""Which experts work for which experience.

Legend: T experiences, N experts of a layer, C cohorts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import NullFormatter

from cl_moe.layers.routing import ExpertLoad
from cl_moe.metrics import functional
from cl_moe.tracking.diagnostics import seen_loads
from cl_moe.tracking.figures import style
from cl_moe.tracking.record import Record

MOST_EXPERTS = 64
"""Beyond so many experts a layer is shown by cohort, with its experts as a curve sorted by load."""

Cohorts = Sequence[tuple[int, int, bool]]


def expert_load(record: Record) -> Figure:
    """Per expert layer, a heat map of the load at the last row: experts (or cohorts) by experience.

    Up to 64 experts: each one's share of an experience's score-weighted load, in units of an even share (1 is
    even). More: the share of each cohort, and beside it all experts sorted by load. Titles give usage and
    unevenness over the experiences trained. A model without expert layers gets a page that says so.
    """
    loads = record.loads[-1] if record.loads else {}
    loads = {layer: row for layer, row in loads.items() if row and row[0].score.numel()}
    if not loads:
        return style.page("This model has no expert layers.")
    cohorts = {layer: _cohorts(record, layer, row[0].score.numel()) for layer, row in loads.items()}
    heights = [_height(row[0].score.numel(), len(cohorts[layer])) for layer, row in loads.items()]
    width = max(7.5, min(3.6 + 0.5 * len(record.names), 14))
    figure = style.new_figure(width, sum(heights) + 0.3)
    parts = figure.subfigures(len(loads), 1, height_ratios=heights, squeeze=False)[:, 0]
    merged = seen_loads(record, record.experiences_trained)
    for part, (layer, row) in zip(parts, loads.items(), strict=True):
        style.headline(part, _headline(layer, row[0].score.numel(), merged.get(layer)), width)
        inside = _draw_layer(part, row, cohorts[layer], merged.get(layer)) * (width - 3)
        style.experience_ticks(part.axes[0], record.names, inside)
    return figure


def relative_loads(loads: Sequence[ExpertLoad]) -> np.ndarray:
    """(N, T) share of every expert in each experience's score-weighted load, times N; NaN without load."""
    columns = [load.score.double().cpu().numpy() for load in loads]
    with np.errstate(invalid="ignore"):
        return np.stack([column / column.sum() * column.size for column in columns], axis=1)


def draw_rank(axes: Axes, relative_N: np.ndarray, **line: object) -> None:
    """Loads in units of an even share, largest first, over the share of experts; unused ones end the line."""
    sorted_N = np.sort(relative_N)[::-1]
    used = sorted_N[sorted_N > 0]
    picked = np.unique(np.geomspace(1, max(len(used), 1), 400).astype(int) - 1)[: len(used)]
    axes.plot((picked + 1) / len(sorted_N), used[picked], **line)  # type: ignore[arg-type]


def rank_axes(axes: Axes) -> None:
    """Axes of a rank plot, once drawn: the even share as a line, loads on a logarithmic scale."""
    axes.axhline(1, color=style.MUTED, lw=0.8, ls="--")
    drawn = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axes.lines])
    axes.set_yscale("log")
    axes.set_ylim(min(max(0.5 * drawn[drawn > 0].min(), 1e-3), 0.1), max(2 * drawn.max(), 10))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlim(-0.02, 1.02)
    axes.set_xlabel("share of experts, by load", fontsize=9)
    axes.set_ylabel("load (1 = even share)", fontsize=9)


def _draw_layer(
    part: SubFigure, loads: Sequence[ExpertLoad], cohorts: Cohorts, merged: ExpertLoad | None
) -> float:
    """One layer: a heat map, and for many experts a rank plot; returns the heat map's share of the width."""
    relative_NT = relative_loads(loads)
    if len(relative_NT) <= MOST_EXPERTS:
        axes = part.add_subplot()
        _draw_experts(part, axes, relative_NT, cohorts)
    else:
        axes, rank = part.subplots(1, 2, width_ratios=[1.5, 1])
        _draw_cohorts(part, axes, relative_NT, cohorts)
        style.plain(rank)
        rank.set_visible(merged is not None)
        if merged is not None:
            draw_rank(rank, relative_loads([merged])[:, 0], color=style.PALETTE[0], lw=2)
        rank_axes(rank)
    axes.set_xlabel("evaluated on", fontsize=9)
    return 1.0 if len(relative_NT) <= MOST_EXPERTS else 0.5


def _draw_experts(part: SubFigure, axes: Axes, relative_NT: np.ndarray, cohorts: Cohorts) -> None:
    """A row per expert, cohorts told apart by lines and named on the left."""
    top = max(2.0, float(np.nanquantile(relative_NT, 0.98))) if np.isfinite(relative_NT).any() else 2.0
    image = axes.imshow(relative_NT, cmap="cividis", vmin=0, vmax=top, aspect="auto", interpolation="nearest")
    ends = np.cumsum([size for size, _, _ in cohorts])
    for end in ends[:-1]:
        axes.axhline(end - 0.5, color="white", lw=2.5)
    middles = ends - np.array([size for size, _, _ in cohorts]) / 2 - 0.5
    axes.set_yticks(middles, [_cohort_name(*cohort) for cohort in cohorts], fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    bar = part.colorbar(image, ax=axes, pad=0.02, fraction=0.05, extend="max")
    bar.set_label("load (1 = even share)", fontsize=9)
    bar.ax.tick_params(labelsize=8)


def _draw_cohorts(part: SubFigure, axes: Axes, relative_NT: np.ndarray, cohorts: Cohorts) -> None:
    """A row per cohort: its share of the load, in per cent."""
    starts = np.cumsum([0, *(size for size, _, _ in cohorts)])[:-1]
    share_CT = np.add.reduceat(relative_NT, starts, axis=0) / len(relative_NT)
    top = float(np.nanmax(share_CT)) if np.isfinite(share_CT).any() else 1.0
    image = axes.imshow(share_CT, cmap="cividis", vmin=0, vmax=top, aspect="auto", interpolation="nearest")
    if share_CT.shape[1] <= 25:
        texts = [[f"{100 * share:.0f}" if np.isfinite(share) else "" for share in row] for row in share_CT]
        style.cell_texts(axes, share_CT, texts, 8 if share_CT.shape[1] <= 12 else 6.5)
    axes.set_yticks(range(len(cohorts)), [_cohort_name(*cohort) for cohort in cohorts], fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    bar = part.colorbar(image, ax=axes, pad=0.02, fraction=0.05, format=lambda share, _: f"{100 * share:.0f}")
    bar.set_label("share of load (%)", fontsize=9)
    bar.ax.tick_params(labelsize=8)


def _headline(layer: int, N: int, load: ExpertLoad | None) -> str:
    """Usage and unevenness of a layer over the experiences trained."""
    if load is None or not load.score.sum() > 0:
        return f"Block {layer}: {N:,} experts, nothing trained yet"
    used, kl = functional.usage(load.score).item(), functional.unevenness(load.score).item()
    bounds = f"0 even, {math.log(N):.2f} one expert"
    return f"Block {layer}: {N:,} experts, usage {used:.1%}, KL unevenness {kl:.3f} nats ({bounds})"


def _cohort_name(size: int, birth: int, frozen: bool) -> str:
    age = "from the start" if birth == 0 else f"born after {birth}"
    return f"{style.compact(size)} {age}{', frozen' if frozen else ''}"


def _cohorts(record: Record, layer: int, num_experts: int) -> Cohorts:
    """The layer's cohorts at the last row; a layer without cohorts counts as one of them."""
    return (record.cohorts[-1].get(layer) if record.cohorts else None) or [(num_experts, 0, False)]


def _height(num_experts: int, num_cohorts: int) -> float:
    """Inches for one layer."""
    rows = num_experts if num_experts <= MOST_EXPERTS else 2 * num_cohorts
    return 2.3 + 0.09 * rows if num_experts <= MOST_EXPERTS else max(3.0, 2.0 + 0.14 * rows)
