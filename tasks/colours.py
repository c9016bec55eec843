"""Colour as a change: grey images are tinted, colour images are turned about the circle of hues.

Legend: N images, H height, W width; 3 channels: red, green, blue.
"""

from __future__ import annotations

import torch
from torch import Tensor


def in_colour(images: Tensor) -> Tensor:
    """(N, 3, H, W): grey images (N, H, W) in three equal channels; colour images as they are."""
    return images[:, None].expand(-1, 3, -1, -1) if images.dim() == 3 else images


def coloured(images: Tensor, degrees_N: Tensor, strength: float = 1.0) -> Tensor:
    """(N, 3, H, W) in [0, 1]: every image under a hue of its own.

    Args:
        images: (N, H, W): what is white takes the hue, black stays black (``tint``). (N, 3, H, W): all hues
            move on by so much (``turn_hues``), so what is grey stays grey.
        degrees_N: 0 is red (or no turn), 120 green, 240 blue; any number, modulo 360.
        strength: in (0, 1]: of the tint, or the share of the turn that is made.
    """
    if images.dim() == 3:
        return tint(images, degrees_N, strength)
    return turn_hues(images, degrees_N * strength)


def hues(degrees_N: Tensor) -> Tensor:
    """(N, 3): the pure colours of hues in degrees (HSV with saturation and value 1).

    >>> hues(torch.tensor([0.0, 60.0, 240.0])).tolist()
    [[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    sixths_N = degrees_N.remainder(360) / 60
    red_N = ((sixths_N - 3).abs() - 1).clamp(0, 1)
    green_N, blue_N = ((2 - (sixths_N - middle).abs()).clamp(0, 1) for middle in (2, 4))
    return torch.stack([red_N, green_N, blue_N], dim=1)


def tint(images_NHW: Tensor, degrees_N: Tensor, strength: float) -> Tensor:
    """Grey times (1 - strength) of white and ``strength`` of a hue, as printed on paper of that colour."""
    paint_N3 = 1 - strength + strength * hues(degrees_N)
    return images_NHW[:, None] * paint_N3[:, :, None, None]


def turn_hues(images_N3HW: Tensor, degrees_N: Tensor) -> Tensor:
    """Colours turned about the axis of greys (Rodrigues' formula), cut to [0, 1].

    120 degrees make red of blue, green of red and blue of green, exactly; the sum of the three channels is
    kept where nothing is cut.
    """
    angle_N = torch.deg2rad(degrees_N)[:, None, None]
    cross_33 = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / 3**0.5
    turn_N33 = angle_N.cos() * torch.eye(3) + (1 - angle_N.cos()) / 3 + angle_N.sin() * cross_33
    return torch.einsum("nij,njhw->nihw", turn_N33, images_N3HW).clamp(0, 1)
