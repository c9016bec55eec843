"""What all figures share: sizes, colours that colour-blind readers tell apart, labels, saving."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, FigureBase

from cl_moe import files
from cl_moe.stream import UNITS, Kind, is_loss

INK, MUTED, RULE = "#222222", "#666666", "#d0d0d0"
# Okabe & Ito (2008) without black (kept for averages) and yellow (too light for lines on white).
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f")
LINES = ("-", "--", ":", "-.")
DPI = 150


class Scale(NamedTuple):
    """How scores of a kind of stream are shown.

    Args:
        label: of an axis, with its unit.
        sign: shown value = sign x R.
        colours: name of a colour map in which brighter is better.
        limits: of the colour scale; None where the data decide.
    """

    label: str
    sign: int
    colours: str
    limits: tuple[float, float] | None


def scale(kind: Kind) -> Scale:
    """Accuracies as they are; losses as losses, of which R holds minus the loss."""
    if is_loss(kind):
        return Scale(f"loss ({UNITS[kind]}, lower is better)", -1, "viridis_r", None)
    return Scale(f"accuracy ({UNITS[kind]})", 1, "viridis", (0.0, 1.0))


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches, laid out so that nothing overlaps."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path) -> Path:
    """Write a PNG, or an SVG if its name ends so, whole or not at all; the same figure, the same bytes."""
    content = BytesIO()
    if not figure.axes:  # nothing to lay out
        figure.set_layout_engine("none")
    if path.suffix == ".svg":  # random ids and the date are in it, unless it is told not to
        with rc_context({"svg.hashsalt": path.stem}):
            figure.savefig(content, format="svg", metadata={"Date": None, "Creator": None})
    else:  # savefig would draw everything once more, for layouts that need it
        FigureCanvasAgg(figure).print_png(content, metadata={"Software": None})
    files.write_atomically(path, content.getbuffer())
    return path


def shorten(name: str, width: int = 22) -> str:
    """A long name with its middle left out.

    >>> shorten("a_very_long_name_of_an_experience", 15)
    'a_very_…erience'
    """
    if len(name) <= width:
        return name
    head = (width - 1) // 2
    return f"{name[:head]}…{name[len(name) - (width - 1 - head) :]}"


def compact(number: float) -> str:
    """A count in at most four characters or so.

    >>> compact(8), compact(1024), compact(16384), compact(1048576)
    ('8', '1024', '16k', '1.0M')
    """
    if number < 10_000:
        return f"{number:.0f}"
    if number < 1_000_000:
        return f"{number / 1000:.0f}k"
    return f"{number / 1_000_000:.1f}M"


def colours(count: int) -> list[str | tuple[float, ...]]:
    """So many colours: distinct ones while there are enough, then a scale without its lightest end."""
    if count <= len(PALETTE):
        return list(PALETTE[:count])
    return [tuple(colour) for colour in colormaps["viridis"](np.linspace(0, 0.92, count))]


def line_styles(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """A colour and a dash pattern for every arm; pairs repeat only after 28 arms."""
    return {
        name: (PALETTE[k % len(PALETTE)], LINES[k // len(PALETTE) % len(LINES)])
        for k, name in enumerate(names)
    }


def plain(axes: Axes, title: str = "", size: float = 10) -> None:
    """Titles on the left, quiet frame, readable ticks."""
    axes.set_title(title, loc="left", fontsize=size, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(labelsize=8, color=MUTED, labelcolor=INK)


def experience_ticks(axes: Axes, names: Sequence[str], inches: float, most: int = 30) -> None:
    """Names under a heat map ``inches`` wide: slanted where they would touch, thinned beyond ``most``."""
    step = -(-len(names) // most)
    shown = [shorten(name) for name in names][::step]
    slanted = max((len(name) for name in shown), default=0) * 0.075 * len(shown) > inches
    axes.set_xticks(range(0, len(names), step), shown, fontsize=8)
    if slanted:
        for label in axes.get_xticklabels():
            label.set(rotation=40, ha="right", rotation_mode="anchor")


def headline(figure: FigureBase, text: str, inches: float) -> None:
    """A title on the left, broken into lines that fit ``inches``."""
    lines = textwrap.wrap(text, max(20, int(inches * 12.5)))
    figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=10, color=INK)


def cell_texts(axes: Axes, shown: np.ndarray, texts: Sequence[Sequence[str]], size: float) -> None:
    """Write a text into every cell of a heat map, black or white by the colour beneath."""
    image = axes.images[0]
    for row, column in np.ndindex(shown.shape):
        if not texts[row][column]:
            continue
        red, green, blue, _ = image.cmap(image.norm(shown[row, column]))
        dark = 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.5
        axes.text(
            column, row, texts[row][column], ha="center", va="center", fontsize=size,
            color="white" if dark else "black",
        )  # fmt: skip


def page(message: str) -> Figure:
    """A figure that only says something."""
    figure = new_figure(6, 3)
    figure.text(0.5, 0.5, message, ha="center", va="center", fontsize=11, color=INK)
    return figure
