"""What forgetting is made of, and how deep tokens go.

Legend: T experiences, i: experiences trained.
"""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

import cl_moe.metrics.functional as F  # noqa: N812
from cl_moe.stream import UNITS
from cl_moe.tracking.figures import style
from cl_moe.tracking.names import depth_points, rewound
from cl_moe.tracking.record import Record


def forgetting_parts(record: Record) -> Figure | None:
    """Bars per old experience: what its score lost since it was learnt, through weights and through routing.

    At the newest row at which forgetting was decomposed. The two add up to the whole, marked by a line; each
    may be negative. None where it never was.
    """
    if not record.rewound:
        return None
    i = max(record.rewound)
    weights, whole = decomposed(record, i)
    routing = whole - weights
    T = len(whole)
    width = max(6.5, min(3 + 0.6 * T, 14))
    figure = style.new_figure(width, 4)
    axes = figure.add_subplot()
    style.plain(axes)
    at = np.arange(T)
    axes.bar(at - 0.2, weights, 0.38, color=style.PALETTE[0], label="weights")
    axes.bar(at + 0.2, routing, 0.38, color=style.PALETTE[1], label="routing (and new classes)")
    axes.hlines(whole, at - 0.42, at + 0.42, color="black", lw=2, label="both")
    axes.axhline(0, color=style.MUTED, lw=0.8)
    axes.grid(axis="y", color=style.RULE, lw=0.6)
    axes.set_axisbelow(True)
    style.experience_ticks(axes, record.names[:T], width - 2)
    axes.set_ylabel(f"forgotten since learnt ({UNITS[record.kind]})", fontsize=9)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    means = f"weights {weights.mean():.3f}, routing and classes {routing.mean():.3f}, both {whole.mean():.3f}"
    style.headline(figure, f"Forgetting after {i} experiences, mean: {means}", width)
    return figure


def decomposed(record: Record, i: int) -> tuple[np.ndarray, np.ndarray]:
    """What each of the experiences before the i-th lost by row i: through the weights alone, and in all."""
    weights, routing = (part.numpy() for part in F.decomposed_forgetting(*rewound(record, i)))
    return weights, weights + routing


def depth_shares(record: Record) -> Figure | None:
    """A curve per block at depth: the share of tokens that went through it, after each experience.

    None for a model in which all tokens go through every block.
    """
    points = {i: depth_points(record, i) for i in range(1, len(record.rows))}
    keys = sorted({key for row in points.values() for key in row})
    if not keys:
        return None
    figure = style.new_figure(7.5, 4)
    axes = figure.add_subplot()
    style.plain(axes)
    for key, colour in zip(keys, style.colours(len(keys)), strict=True):
        known = [i for i in points if key in points[i]]
        name = key.split("/")[1].replace("layer_", "block ")
        axes.plot(known, [points[i][key] for i in known], "o-", color=colour, ms=4, lw=1.6, label=name)
    T = len(record.names)
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlim(0.7, T + 0.3)
    axes.set_xticks(range(1, T + 1, -(-T // 25)))
    axes.grid(color=style.RULE, lw=0.6)
    axes.set_xlabel("experiences trained", fontsize=9)
    axes.set_ylabel("share of tokens", fontsize=9)
    style.headline(figure, "Tokens that go through each block at depth, on what was trained so far", 7.5)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure
