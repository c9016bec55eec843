"""Transformations of images: the same pictures permuted, rotated or corrupted, one way per experience.

Legend: N images, H height, W width, P pixels, K taps of a filter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from cl_moe.errors import InputError
from cl_moe.seeds import generator

KEY = "stream.transform"
CORRUPTIONS = ("clean", "blur", "noise", "contrast")
_OPTIONS: dict[str, dict[str, object]] = {
    "permuted": {},
    "rotated": {"degrees": (0, 15, 30, 45, 60)},
    "corrupted": {"corruptions": CORRUPTIONS, "severity": 0.5},
}


class Transform:
    """Numbered ways to change images; the number and the seed alone say how.

    Args:
        options: ``{kind: permuted}``: a fixed permutation of the pixels, number 0 the identity, without end.
            ``{kind: rotated, degrees: [0, 15, ...]}``: counter-clockwise about the middle, bilinear, zeros
            from outside. ``{kind: corrupted, corruptions: [clean, blur, noise, contrast], severity: .5}``: a
            Gaussian filter of standard deviation 3 severity pixels, Gaussian noise of standard deviation .6
            severity cut to [0, 1], contrast multiplied by 1 - .9 severity about an image's mean. Severities
            are in (0, 1]; they are this file's own, not those of MNIST-C.

    Attributes:
        names: of the numbered ways; None without end.

    Raises:
        InputError: an unknown kind or key, or a value that is not allowed.
    """

    def __init__(self, options: Mapping[str, object]) -> None:
        given = dict(options) if isinstance(options, Mapping) else {}
        self.kind = str(given.pop("kind", None))
        if self.kind not in _OPTIONS:
            raise InputError(got=f"{options!r}", allowed=f"{{kind: {' or '.join(_OPTIONS)}}}", key=KEY)
        known = _OPTIONS[self.kind]
        for key in given:
            if key not in known:
                raise InputError(
                    got=f"{key} for {self.kind} images",
                    allowed=", ".join(known) or "no key beside kind",
                    key=f"{KEY}.{key}",
                )
        settings = {**known, **given}
        self.ways = self._ways(settings)
        self.severity = _severity(settings.get("severity", 0.5))

    def _ways(self, settings: Mapping[str, object]) -> list[float] | list[str] | None:
        if self.kind == "rotated":
            return list(_listed(settings["degrees"], "degrees", int | float, "different angles"))
        if self.kind == "corrupted":
            ways = _listed(settings["corruptions"], "corruptions", str, f"of {', '.join(CORRUPTIONS)}")
            if unknown := [way for way in ways if way not in CORRUPTIONS]:
                raise InputError(
                    got=f"{unknown[0]!r}", allowed=", ".join(CORRUPTIONS), key=f"{KEY}.corruptions"
                )
            return list(ways)
        return None

    def name(self, number: int) -> str:
        """Of one way, for people."""
        if self.ways is None:
            return f"permutation {number}"
        way = self.ways[number]
        return f"{way:g} degrees" if isinstance(way, int | float) else str(way)

    def __call__(self, images_NHW: Tensor, number: int, seed: int, part: str) -> Tensor:
        """Changed images, of the same shape and in [0, 1].

        Args:
            images_NHW: (N, H, W) float32 in [0, 1].
            number: of the way.
            seed: draws permutations and noise.
            part: ``train`` or ``test``, which get different noise.
        """
        if self.ways is None:
            pixels_P = permutation(number, images_NHW[0].numel(), seed)
            return images_NHW.flatten(1)[:, pixels_P].view_as(images_NHW)
        way = self.ways[number]
        if isinstance(way, int | float):
            return rotate(images_NHW, float(way))
        if way == "blur":
            return blur(images_NHW, 3 * self.severity)
        if way == "noise":
            drawn = generator(seed, number, "noise", part)
            noise_NHW = torch.randn(images_NHW.shape, generator=drawn)
            return (images_NHW + 0.6 * self.severity * noise_NHW).clamp(0, 1)
        if way == "contrast":
            mean_N11 = images_NHW.mean(dim=(1, 2), keepdim=True)
            return mean_N11 + (1 - 0.9 * self.severity) * (images_NHW - mean_N11)
        return images_NHW.clone()


def permutation(number: int, num_pixels: int, data_seed: int) -> Tensor:
    """Where each pixel of permutation ``number`` comes from: (num_pixels,) int64; number 0 is the identity.

    It depends on its number and the seed alone: a longer stream begins with the same permutations.
    """
    if number == 0:
        return torch.arange(num_pixels)
    return torch.randperm(num_pixels, generator=generator(data_seed, number, "permutation"))


def rotate(images_NHW: Tensor, degrees: float) -> Tensor:
    """Rotated counter-clockwise about the middle; bilinear, zeros from outside; 0 degrees change nothing."""
    if degrees == 0:
        return images_NHW.clone()
    height, width = images_NHW.shape[1:]
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    # where a pixel comes from, in units of half a side: x to the right, y downwards
    back = torch.tensor([[cos, -sin * height / width, 0.0], [sin * width / height, cos, 0.0]])
    grid = F.affine_grid(back[None], [1, 1, height, width], align_corners=False)
    # all images as channels of one, so that the grid is made and kept once
    return F.grid_sample(images_NHW[None], grid, padding_mode="zeros", align_corners=False)[0]


def blur(images_NHW: Tensor, deviation: float) -> Tensor:
    """A Gaussian filter, separable, over three standard deviations; the edge is repeated outwards."""
    reach = math.ceil(3 * deviation)
    taps_K = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / deviation) ** 2)
    taps_K = taps_K / taps_K.sum()
    padded = F.pad(images_NHW[:, None], (reach,) * 4, mode="replicate")
    rows = F.conv2d(padded, taps_K.view(1, 1, -1, 1))
    return F.conv2d(rows, taps_K.view(1, 1, 1, -1))[:, 0].clamp(0, 1)


def _listed(value: object, name: str, kind: Any, allowed: str) -> list[Any]:
    items = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else []
    right = all(isinstance(item, kind) and not isinstance(item, bool) for item in items)
    if not items or not right or len(set(items)) != len(items):
        raise InputError(got=f"{value!r}", allowed=f"a list of {allowed}", key=f"{KEY}.{name}")
    return items


def _severity(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise InputError(got=f"{value!r}", allowed="a number in (0, 1]", key=f"{KEY}.severity")
    return float(value)
