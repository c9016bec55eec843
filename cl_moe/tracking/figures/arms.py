"""Several arms side by side: the mean over seeds, with a band of one standard deviation to either side.

Everything here takes plain arrays. Legend: S seeds (or orders) of an arm, T experiences, R (rows, T), N
experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cl_moe.errors import InputError
from cl_moe.metrics import functional
from cl_moe.stream import Kind, is_loss
from cl_moe.tracking.figures import style
from cl_moe.tracking.figures.load import rank_axes
from cl_moe.tracking.figures.matrix import draw_matrix, seen_average

Matrices = Mapping[str, Sequence[np.ndarray]]
MOST_PANELS = 12


def compare_curves(
    arms: Matrices, names: Sequence[str] | None = None, kind: Kind = "classification"
) -> Figure:
    """The average over experiences trained, large, then a small panel per experience; a line per arm.

    Args:
        arms: ``{arm: [R of each seed]}``, each (T + 1, T), higher is better (minus the loss where it is one).
        names: of the T experiences; numbers where left out. Of more than 12, an even choice is shown.
        kind: of the stream.

    Raises:
        InputError: no arms, an arm without runs, or matrices of different shapes.
    """
    T = _num_experiences(arms)
    names, look = _names(names, T), style.scale(kind)
    looks = style.line_styles(arms)
    stacks = {arm: look.sign * np.stack(matrices) for arm, matrices in arms.items()}
    panels = np.unique(np.linspace(0, T - 1, min(T, MOST_PANELS)).round().astype(int))
    columns = max(2, T) if T <= 5 else 4
    rows = -(-len(panels) // columns)
    figure = style.new_figure(10, 3.6 + 1.7 * rows + 0.25 * _legend_rows(arms))
    grid = figure.add_gridspec(1 + rows, columns, height_ratios=[2.0, *[1] * rows])
    top = figure.add_subplot(grid[0, :])
    faint = min(0.15, 1.2 / len(arms))  # bands of many arms would hide the lines
    for arm, stack in stacks.items():
        averages = np.stack([seen_average(R) for R in stack])
        _band(
            top,
            averages[:, 1:],
            1,
            *looks[arm],
            alpha=faint,
            label=f"{arm} ({len(stack)} runs)" if len(stack) > 1 else arm,
        )
    style.plain(top, "Average over the experiences trained")
    top.set_ylabel(look.label, fontsize=9)
    top.set_xlabel("experiences trained", fontsize=9)
    shared: Axes | None = None
    for place, j in enumerate(panels):
        axes = figure.add_subplot(grid[1 + place // columns, place % columns], sharey=shared)
        shared = shared or axes
        for arm, stack in stacks.items():
            _band(axes, stack[:, :, j], 0, *looks[arm], alpha=faint)
        axes.axvline(j + 1, color=style.MUTED, lw=0.8, ls=":")
        name = style.shorten(names[j])
        style.plain(axes, name if name == f"experience {j + 1}" else f"{j + 1}: {name}", 9)
        axes.tick_params(labelleft=place % columns == 0)
    for axes in figure.axes:
        axes.set_xlim(-0.2, T + 0.2)
        axes.set_xticks(range(0, T + 1, -(-T // 10)))
        axes.grid(color=style.RULE, lw=0.5)
        if not is_loss(kind):
            axes.set_ylim(-0.03, 1.03)
    _legend(figure, top, arms)
    return figure


def compare_matrices(
    arms: Matrices, names: Sequence[str] | None = None, kind: Kind = "classification"
) -> Figure:
    """A heat map of the mean matrix of every arm, on one colour scale; of more than 12, the first 12.

    Args:
        arms: ``{arm: [R of each seed]}``, each (T + 1, T).
        names: of the T experiences.
        kind: of the stream.

    Raises:
        InputError: as for ``compare_curves``.
    """
    T, num_arms = _num_experiences(arms), len(arms)
    arms = dict(list(arms.items())[:MOST_PANELS])
    names, look = _names(names, T), style.scale(kind)
    means = {arm: np.mean(np.stack(matrices), axis=0) for arm, matrices in arms.items()}
    shown = look.sign * np.stack(list(means.values()))
    limits = look.limits or (float(shown.min()), float(shown.max()) + 1e-9)
    columns = min(len(arms), 3)
    rows = -(-len(arms) // columns)
    side = min(max(2.8, 0.42 * T), 4.0)
    width = columns * (side + 0.4) + 1.6
    figure = style.new_figure(width, rows * (side * 0.85 + 0.5) + 1.0)
    if num_arms > len(arms):
        style.headline(figure, f"The first {len(arms)} of {num_arms} arms", width)
    grid = figure.subplots(rows, columns, squeeze=False)
    for place, axes in enumerate(grid.flat):
        axes.set_visible(place < len(arms))
    for place, (arm, mean) in enumerate(means.items()):
        axes = grid.flat[place]
        draw_matrix(axes, mean, kind, limits, values=T <= 10)
        style.plain(axes, f"{style.shorten(arm, 30)} (mean of {len(arms[arm])})", 9)
        last_row = place + columns >= len(arms)
        style.experience_ticks(axes, names if last_row else [""] * T, side, most=12)
        axes.set_yticks(range(0, T + 1, -(-T // 10)))
        if place % columns == 0:
            axes.set_ylabel("experiences trained", fontsize=9)
    bar = figure.colorbar(grid.flat[0].images[0], ax=grid, pad=0.02, fraction=0.03)
    bar.set_label(look.label, fontsize=9)
    bar.ax.tick_params(labelsize=8)
    return figure


def compare_loads(arms: Mapping[str, Mapping[int, Sequence[np.ndarray]]]) -> Figure:
    """Per expert layer: experts sorted by load, a line per arm, and beside it each run's unevenness.

    Args:
        arms: ``{arm: {block index: [load of each seed]}}``, each (N,), score-weighted, not normalised; N may
            differ between arms and seeds. Arms without expert layers have an empty inner mapping; where no
            arm has any, the page says so.
    """
    layers = sorted({layer for per_layer in arms.values() for layer in per_layer})
    if not layers:
        return style.page("No arm has expert layers.")
    looks = style.line_styles(arms)
    panel = max(2.9, 1.1 + 0.3 * len(arms))
    figure = style.new_figure(10, panel * len(layers))
    grid = figure.subplots(len(layers), 2, squeeze=False, width_ratios=[1.4, 1])
    for (rank, dots), layer in zip(grid, layers, strict=True):
        here = {arm: per_layer[layer] for arm, per_layer in arms.items() if layer in per_layer}
        labels = []
        for place, (arm, loads) in enumerate(here.items()):
            share, curves = _rank_curves(loads)
            _band(rank, np.maximum(curves, 1e-9), share, *looks[arm])
            kl, used = _unevenness(loads), _usage(loads)
            dots.plot(kl, [place] * len(kl), "o", color=looks[arm][0], ms=5, alpha=0.6, mew=0)
            dots.plot(kl.mean(), place, "|", color=looks[arm][0], ms=16, mew=2.5)
            labels.append(f"{style.shorten(arm, 26)}\nusage {used.mean():.1%}")
        rank_axes(rank)
        style.plain(rank, f"Block {layer}: experts sorted by load")
        style.plain(dots, "KL unevenness (nats; 0 is even)")
        dots.set_yticks(range(len(here)), labels, fontsize=8)
        dots.set_ylim(len(here) - 0.4, -0.6)
        dots.set_xlim(left=0, right=max(dots.get_xlim()[1], 0.05))
        dots.grid(axis="x", color=style.RULE, lw=0.5)
    return figure


def _band(
    axes: Axes,
    values_SX: np.ndarray,
    start: int | np.ndarray,
    colour: str,
    dash: str,
    alpha: float = 0.15,
    label: str | None = None,
) -> None:
    """A line for the mean of several curves, and a band for their spread."""
    mean_X = values_SX.mean(axis=0)
    x = start if isinstance(start, np.ndarray) else np.arange(start, start + len(mean_X))
    axes.plot(x, mean_X, color=colour, ls=dash, lw=1.8, label=label)
    if len(values_SX) > 1:
        spread_X = values_SX.std(axis=0, ddof=1)
        low_X = np.maximum(mean_X - spread_X, values_SX.min(axis=0))  # a share stays positive
        high_X = np.minimum(mean_X + spread_X, values_SX.max(axis=0))
        axes.fill_between(x, low_X, high_X, color=colour, alpha=alpha, lw=0)


def _rank_curves(loads: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Share of experts (X,), and for each seed the sorted load there in units of an even share, (S, X)."""
    most = max(len(load) for load in loads)
    share_X = (np.arange(min(most, 400)) + 0.5) / min(most, 400)
    curves = []
    for load in loads:
        sorted_N = np.sort(load.astype(float))[::-1] / load.sum() * len(load)
        curves.append(np.interp(share_X, (np.arange(len(load)) + 0.5) / len(load), sorted_N))
    return share_X, np.stack(curves)


def _unevenness(loads: Sequence[np.ndarray]) -> np.ndarray:
    import torch

    return np.array(
        [functional.unevenness(torch.from_numpy(np.asarray(load, float))).item() for load in loads]
    )


def _usage(loads: Sequence[np.ndarray]) -> np.ndarray:
    return np.array([float((load > 0).mean()) for load in loads])


def _legend(figure: Figure, axes: Axes, arms: Mapping[str, object]) -> None:
    """One legend for all panels, below them."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower left", ncols=_legend_columns(arms), fontsize=8.5, frameon=False
    )


def _legend_columns(arms: Mapping[str, object]) -> int:
    longest = max(len(arm) for arm in arms) + 17  # with the number of runs, and a sample of the line
    return max(1, min(len(arms), 130 // longest))


def _legend_rows(arms: Mapping[str, object]) -> int:
    return -(-len(arms) // _legend_columns(arms))


def _num_experiences(arms: Matrices) -> int:
    """T, the same in all matrices."""
    shapes = {R.shape for matrices in arms.values() for R in matrices}
    if len(shapes) != 1 or not all(len(matrices) for matrices in arms.values()):
        raise InputError(
            got=f"{len(arms)} arms with matrices of shapes {sorted(shapes)}",
            allowed="at least one run per arm, all of one shape (T + 1, T)",
            key="arms",
        )
    return int(shapes.pop()[1])


def _names(names: Sequence[str] | None, T: int) -> Sequence[str]:
    """Names of the experiences, or their numbers."""
    names = [f"experience {j + 1}" for j in range(T)] if names is None else names
    if len(names) != T:
        raise InputError(got=f"{len(names)} names", allowed=f"{T}, one per experience", key="names")
    return names
