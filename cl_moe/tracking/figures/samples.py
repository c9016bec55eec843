"""A contact sheet: some images of every experience, one row each.

Legend: N images, H height, W width, c channels (1 or 3).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from cl_moe.tracking.figures import style

_MOST = 40
"""Rows on a sheet; of longer streams, so many experiences at even distances."""


def contact_sheet(title: str, names: Sequence[str], images: Sequence[Tensor]) -> Figure:
    """One mosaic for the whole stream, so that a sheet is quick to draw.

    Args:
        title: of the sheet.
        names: of the experiences.
        images: (N, H, W, c) of each experience, in [0, 1]; N may differ.
    """
    count = min(_MOST, len(names))
    chosen = [place * len(names) // count for place in range(count)]
    height, width, channels = images[0].shape[1:]
    columns = max(len(images[place]) for place in chosen)
    sheet = np.ones((count * (height + 1), columns * (width + 1), channels))
    for row, place in enumerate(chosen):
        for column, image in enumerate(images[place].clamp(0, 1).numpy()):
            top, left = row * (height + 1), column * (width + 1)
            sheet[top : top + height, left : left + width] = image
    figure = style.new_figure(8.0, 1.0 + count * 6.0 / columns * height / width)
    axes = figure.add_subplot()
    axes.imshow(sheet if channels == 3 else sheet[:, :, 0], cmap="gray", vmin=0, vmax=1)
    axes.set_xticks([])
    middles = [row * (height + 1) + height / 2 for row in range(count)]
    axes.set_yticks(middles, [style.shorten(names[place], 30) for place in chosen], fontsize=8)
    axes.spines[:].set_visible(False)
    style.headline(figure, f"{title}: training examples", 8.0)
    return figure
