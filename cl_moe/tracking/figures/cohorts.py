"""Who works for whom: experts born together against experiences, as loads and as leak.

Legend: T experiences, C cohorts of a layer, those born at the same boundary being one here.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from cl_moe.metrics import functional
from cl_moe.tracking import diagnostics
from cl_moe.tracking.figures import style
from cl_moe.tracking.record import Record

_Layer = tuple[np.ndarray, np.ndarray, np.ndarray]  # share (C, T), experts (C,), births (C,)


def cohort_load(record: Record) -> Figure | None:
    """Per layer, how busy an expert of each cohort is with each experience at the last row.

    Cohorts (by birth, oldest on top) by experiences; 1 is an even share of the layer's score-weighted load.
    None where nothing was born after the start.
    """
    return _figure(record, _draw_load)


def leak_matrix(record: Record) -> Figure | None:
    """Per layer, which share of each experience's routed weight goes to each cohort at the last row.

    Columns add up to 100%. Below the white staircase experts were born after the experience was learnt: what
    stands there leaked. None where nothing was born after the start.
    """
    return _figure(record, _draw_leak)


def by_birth(record: Record) -> dict[int, _Layer]:
    """Per layer with several births at the last row: shares (C, T), numbers of experts (C,), births (C,)."""
    last = record.experiences_trained
    shares = record.shares[last] if last < len(record.shares) else {}
    if not shares and last < len(record.loads):
        shares = diagnostics.shares(record, last)
    found = {}
    for layer, share_CT in shares.items():
        sizes, births, _ = zip(*diagnostics.cohorts_of(record, last, layer, 0), strict=True)
        distinct, at = np.unique(births, return_inverse=True)
        if len(distinct) > 1 and torch.isfinite(share_CT).any():
            summed_CT, experts_C = np.zeros((len(distinct), share_CT.shape[1])), np.zeros(len(distinct))
            np.add.at(summed_CT, at, share_CT.double().numpy())
            np.add.at(experts_C, at, sizes)
            found[layer] = (summed_CT, experts_C, distinct)
    return found


def _figure(record: Record, draw: Callable[[SubFigure, Axes, _Layer, int], str]) -> Figure | None:
    layers = by_birth(record)
    if not layers:
        return None
    heights = [1.7 + 0.3 * len(births_C) for _, _, births_C in layers.values()]
    labels = max(len(style.shorten(name)) for name in record.names) * 0.04
    width = max(6.5, min(3.6 + 0.55 * len(record.names), 14))
    figure = style.new_figure(width, sum(heights) + labels * len(heights) + 0.2)
    parts = figure.subfigures(len(layers), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, (block, layer) in zip(parts, layers.items(), strict=True):
        axes = part.add_subplot()
        title = draw(part, axes, layer, record.experiences_trained)
        style.headline(part, f"Block {block}, after {_counted(record.experiences_trained)}: {title}", width)
        names = [_name(size, birth) for size, birth in zip(*layer[1:], strict=True)]
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("evaluated on", fontsize=9)
        style.experience_ticks(axes, record.names, width - 3)
    return figure


def _draw_load(part: SubFigure, axes: Axes, layer: _Layer, trained: int) -> str:
    share_CT, experts_C, _ = layer
    relative_CT = share_CT * (experts_C.sum() / experts_C)[:, None]
    busiest = np.unravel_index(np.nanargmax(relative_CT), relative_CT.shape)
    _heat_map(part, axes, relative_CT, "load (1 = even share)", lambda value: f"{value:.2g}")
    return f"an expert's load by its birth, at most {relative_CT[busiest]:.2g} times an even share"


def _draw_leak(part: SubFigure, axes: Axes, layer: _Layer, trained: int) -> str:
    share_CT, _, births_C = layer
    _heat_map(part, axes, share_CT, "share of weight (%)", lambda value: f"{100 * value:.0f}", percent=True)
    # the first cohort that was born after the experience was learnt, for each experience
    edge_T = np.searchsorted(births_C, np.arange(share_CT.shape[1]), side="right") - 0.5
    axes.stairs(edge_T, np.arange(share_CT.shape[1] + 1) - 0.5, baseline=None, color="white", lw=2.5)
    axes.set_ylim(len(births_C) - 0.5, -0.5)
    leak = functional.leak(torch.from_numpy(share_CT[:, :trained]), births_C.tolist()).item()
    told = f"{leak:.1%} of old experiences' weight leaks to later experts" if leak == leak else "no leak yet"
    return f"where weight is routed, {told}"


def _heat_map(
    part: SubFigure,
    axes: Axes,
    shown_CT: np.ndarray,
    label: str,
    text: Callable[[float], str],
    percent: bool = False,
) -> None:
    """Cells with their values where there is room, and the scale."""
    most = max(0.0 if percent else 2.0, float(np.nanmax(shown_CT)))
    image = axes.imshow(shown_CT, cmap="cividis", vmin=0, vmax=most, aspect="auto", interpolation="nearest")
    style.plain(axes)
    if shown_CT.shape[1] <= 25:
        texts = [[text(value) if np.isfinite(value) else "" for value in row] for row in shown_CT]
        style.cell_texts(axes, shown_CT, texts, 8 if shown_CT.shape[1] <= 12 else 6.5)
    scale = (lambda value, _: f"{100 * value:.0f}") if percent else None
    bar = part.colorbar(image, ax=axes, pad=0.02, fraction=0.05, format=scale)
    bar.set_label(label, fontsize=9)
    bar.ax.tick_params(labelsize=8)


def _name(size: float, birth: int) -> str:
    return f"{style.compact(size)} {'from the start' if birth == 0 else f'born after {birth}'}"


def _counted(trained: int) -> str:
    return f"{trained} experience{'s' * (trained != 1)}"
