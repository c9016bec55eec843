"""Changed images: the same pictures permuted, rotated, corrupted or coloured, one way per experience.

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
from tasks.colours import coloured, in_colour

KEY = "stream.transform"
CORRUPTIONS = ("clean", "blur", "noise", "contrast", "colour")
WEARERS = ("experience", "class")
_OPTIONS: dict[str, dict[str, object]] = {
    "permuted": {},
    "rotated": {"degrees": (0, 15, 30, 45, 60)},
    "corrupted": {"corruptions": CORRUPTIONS[:4], "severity": 0.5},
    "coloured": {"hues": (0, 72, 144, 216, 288), "by": "experience", "strength": 1.0},
}


class Transform:
    """Numbered ways to change images; the number and the seed alone say how.

    Args:
        options: ``{kind: permuted}``: a fixed permutation of the pixels, number 0 the identity, without end.

            ``{kind: rotated, degrees: [0, 15, ...]}``: counter-clockwise about the middle, bilinear, zeros
            from outside.

            ``{kind: corrupted, corruptions: [clean, blur, noise, contrast], severity: .5}``: a Gaussian
            filter of standard deviation 3 severity pixels, Gaussian noise of standard deviation .6 severity
            cut to [0, 1], contrast multiplied by 1 - .9 severity about an image's mean. ``colour``: each
            image under a hue of its own, a grey one tinted with the strength ``severity``, a colour one
            turned by up to 180 severity degrees either way. Severities are in (0, 1]; they are this file's
            own, not those of MNIST-C.

            ``{kind: coloured, hues: [0, 72, ...], by: experience, strength: 1}``: grey images tinted in a
            hue, the hues of colour images turned by so many degrees (``tasks.colours.coloured``). By
            ``experience``, the i-th way is the i-th hue. By ``class``, the variant of coloured MNIST of Kim
            et al. (1812.10352, section 5.1) with pure hues: training images wear the colour of their class,
            test images any of the colours, so whoever reads the colour in place of the shape fails; way
            number i draws which class wears which (number 0: class c the c-th, modulo their number), without
            end.

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
        self.severity = _share(settings.get("severity", 0.5), "severity")
        self.strength = _share(settings.get("strength", 1.0), "strength")
        self.hues = _numbers(settings, "hues", "different hues in degrees")
        self.by_class = _wearer(settings.get("by", "experience")) == "class"
        self.ways = self._ways(settings)
        self.in_colour = self.kind == "coloured" or "colour" in (self.ways or ())

    def _ways(self, settings: Mapping[str, object]) -> list[float] | list[str] | None:
        if self.kind == "rotated":
            return _numbers(settings, "degrees", "different angles")
        if self.kind == "coloured" and not self.by_class:
            return self.hues
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
            return f"{'colours' if self.by_class else 'permutation'} {number}"
        way = self.ways[number]
        if isinstance(way, int | float):
            return f"{'hue ' if self.kind == 'coloured' else ''}{way:g} degrees"
        return str(way)

    def __call__(self, images: Tensor, classes_N: Tensor, number: int, seed: int, part: str) -> Tensor:
        """Changed images in [0, 1]; grey ones stay (N, H, W), unless some way of these is in colour.

        Args:
            images: (N, H, W) grey or (N, 3, H, W) in colour, float32 in [0, 1].
            classes_N: int64, their labels, which only colours by class look at.
            number: of the way.
            seed: draws permutations, noise and colours.
            part: ``train`` or ``test``, which get different noise.
        """
        drawn = generator(seed, number, "noise", part)
        if self.kind == "coloured":
            return coloured(images, self._worn(classes_N, number, seed, part), self.strength)
        changed = self._changed(images, number, seed, drawn)
        return in_colour(changed).clone() if self.in_colour else changed

    def _changed(self, images: Tensor, number: int, seed: int, drawn: torch.Generator) -> Tensor:
        if self.ways is None:
            pixels_P = permutation(number, images.shape[-2:].numel(), seed)
            return images.flatten(-2)[..., pixels_P].view_as(images)
        way = self.ways[number]
        if isinstance(way, int | float):
            return rotate(images.flatten(0, -3), float(way)).view_as(images)
        if way == "blur":
            return blur(images.flatten(0, -3), 3 * self.severity).view_as(images)
        if way == "noise":
            noise = torch.randn(images.shape, generator=drawn)
            return (images + 0.6 * self.severity * noise).clamp(0, 1)
        if way == "contrast":
            mean = images.mean(dim=tuple(range(1, images.dim())), keepdim=True)
            return mean + (1 - 0.9 * self.severity) * (images - mean)
        if way == "colour":
            turns_N = 360 * torch.rand(len(images), generator=drawn) - 180
            return coloured(images, turns_N, self.severity)
        return images.clone()

    def _worn(self, classes_N: Tensor, number: int, seed: int, part: str) -> Tensor:
        """(N,) the hue of each image, in degrees."""
        hues_h = torch.tensor(self.hues, dtype=torch.float32)
        if not self.by_class:
            return hues_h[number].expand(len(classes_N))
        if part != "train":
            drawn = generator(seed, number, "hues", part)
            return hues_h[torch.randint(len(hues_h), classes_N.shape, generator=drawn)]
        return hues_h[permutation(number, len(hues_h), seed)][classes_N % len(hues_h)]


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


def _numbers(settings: Mapping[str, object], name: str, allowed: str) -> list[float]:
    """A list of different finite numbers; empty where the kind has none."""
    if name not in settings:
        return []
    numbers = _listed(settings[name], name, int | float, allowed)
    if not all(math.isfinite(number) for number in numbers):
        raise InputError(got=f"{numbers}", allowed=f"a list of {allowed}", key=f"{KEY}.{name}")
    return numbers


def _listed(value: object, name: str, kind: Any, allowed: str) -> list[Any]:
    items = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else []
    right = all(isinstance(item, kind) and not isinstance(item, bool) for item in items)
    if not items or not right or len(set(items)) != len(items):
        raise InputError(got=f"{value!r}", allowed=f"a list of {allowed}", key=f"{KEY}.{name}")
    return items


def _share(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise InputError(got=f"{value!r}", allowed="a number in (0, 1]", key=f"{KEY}.{name}")
    return float(value)


def _wearer(value: object) -> str:
    if value not in WEARERS:
        raise InputError(got=f"{value!r}", allowed=", ".join(WEARERS), key=f"{KEY}.by")
    return str(value)
