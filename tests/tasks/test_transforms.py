"""Permuted, rotated and corrupted images, against numpy and scipy."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from cl_moe.errors import InputError
from tasks.colours import hues, in_colour, turn_hues
from tasks.transforms import Transform, blur, rotate

LABELS = torch.arange(4)


def images(count: int = 4, height: int = 9, width: int = 9) -> torch.Tensor:
    return torch.rand(count, height, width, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_right_angles_are_exact(turns: int) -> None:
    x_NHW = images()
    assert torch.allclose(rotate(x_NHW, 90.0 * turns), torch.rot90(x_NHW, turns, (1, 2)), atol=1e-5)


@given(st.floats(-180, 180), st.integers(5, 12), st.integers(5, 12))
def test_any_angle_is_that_of_scipy(degrees: float, height: int, width: int) -> None:
    x_NHW = images(2, height, width)
    expected = ndimage.rotate(
        x_NHW.numpy(), degrees, axes=(1, 2), reshape=False, order=1, mode="grid-constant", cval=0.0
    )
    assert np.allclose(rotate(x_NHW, degrees).numpy(), expected, atol=2e-4)


def test_no_angle_changes_nothing_but_the_memory() -> None:
    x_NHW = images()
    turned = rotate(x_NHW, 0.0)
    assert torch.equal(turned, x_NHW)
    assert turned.data_ptr() != x_NHW.data_ptr()


@pytest.mark.parametrize("deviation", [0.4, 1.0, 1.5])
def test_blur_is_a_gaussian_filter(deviation: float) -> None:
    reach = int(np.ceil(3 * deviation))
    x_NHW = images()
    expected = ndimage.gaussian_filter(
        x_NHW.numpy(), (0, deviation, deviation), mode="nearest", radius=(0, reach, reach)
    )
    assert np.allclose(blur(x_NHW, deviation).numpy(), expected, atol=1e-5)


def test_contrast_keeps_the_mean_and_shrinks_the_spread() -> None:
    x_NHW = images()
    flat = Transform({"kind": "corrupted", "corruptions": ["contrast"], "severity": 0.5})(
        x_NHW, LABELS, 0, 0, "train"
    )
    assert torch.allclose(flat.mean(dim=(1, 2)), x_NHW.mean(dim=(1, 2)), atol=1e-6)
    assert torch.allclose(flat.std(dim=(1, 2)), 0.55 * x_NHW.std(dim=(1, 2)), atol=1e-5)


def test_noise_is_as_strong_as_it_says_and_another_in_the_test_data() -> None:
    change = Transform({"kind": "corrupted", "corruptions": ["clean", "noise"], "severity": 0.25})
    grey_NHW = torch.full((50, 20, 20), 0.5)
    train, test = (change(grey_NHW, LABELS, 1, 0, part) for part in ("train", "test"))
    assert (train - grey_NHW).std().item() == pytest.approx(0.15, rel=0.03)
    assert not torch.equal(train, test)
    assert torch.equal(train, change(grey_NHW, LABELS, 1, 0, "train"))
    assert not torch.equal(train, change(grey_NHW, LABELS, 1, 1, "train"))
    assert torch.equal(change(grey_NHW, LABELS, 0, 0, "train"), grey_NHW)


@given(st.integers(0, 50), st.integers(0, 99))
def test_a_permutation_keeps_every_pixel(number: int, seed: int) -> None:
    x_NHW = images()
    moved = Transform({"kind": "permuted"})(x_NHW, LABELS, number, seed, "train")
    assert torch.equal(moved.flatten(1).sort().values, x_NHW.flatten(1).sort().values)
    assert torch.equal(moved, x_NHW) == (number == 0)


@pytest.mark.parametrize("way", range(3))
def test_what_comes_out_is_an_image(way: int) -> None:
    changed = Transform({"kind": "corrupted", "corruptions": ["blur", "noise", "contrast"], "severity": 1})(
        images(), LABELS, way, 0, "train"
    )
    assert changed.shape == images().shape
    assert 0 <= changed.min() <= changed.max() <= 1


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({}, "stream.transform"),
        ("rotated", "stream.transform"),
        ({"kind": "melted"}, "stream.transform"),
        ({"kind": "permuted", "degrees": [1]}, "stream.transform.degrees"),
        ({"kind": "rotated", "degrees": []}, "stream.transform.degrees"),
        ({"kind": "rotated", "degrees": [10, 10]}, "stream.transform.degrees"),
        ({"kind": "rotated", "degrees": ["a"]}, "stream.transform.degrees"),
        ({"kind": "rotated", "degrees": [True]}, "stream.transform.degrees"),
        ({"kind": "corrupted", "corruptions": ["rust"]}, "stream.transform.corruptions"),
        ({"kind": "corrupted", "corruptions": "blur"}, "stream.transform.corruptions"),
        ({"kind": "corrupted", "severity": 0}, "stream.transform.severity"),
        ({"kind": "corrupted", "severity": 2}, "stream.transform.severity"),
        ({"kind": "coloured", "hues": [0, 0]}, "stream.transform.hues"),
        ({"kind": "coloured", "hues": [0, float("nan")]}, "stream.transform.hues"),
        ({"kind": "coloured", "strength": 0}, "stream.transform.strength"),
        ({"kind": "coloured", "by": "task"}, "stream.transform.by"),
        ({"kind": "coloured", "severity": 0.5}, "stream.transform.severity"),
    ],
)
def test_what_is_refused(options: object, key: str) -> None:
    with pytest.raises(InputError) as caught:
        Transform(options)  # type: ignore[arg-type]
    assert caught.value.key == key


def rgb(count: int = 4) -> torch.Tensor:
    return torch.rand(count, 3, 5, 6, generator=torch.Generator().manual_seed(1))


@given(st.floats(-400, 800))
def test_hues_are_those_of_the_standard_library(degrees: float) -> None:
    expected = colorsys.hsv_to_rgb(degrees % 360 / 360, 1.0, 1.0)
    assert np.allclose(hues(torch.tensor([degrees])).numpy(), [expected], atol=1e-4)


@given(st.floats(-400, 400), st.floats(-400, 400))
def test_turned_hues_keep_greys_and_sums_and_add_up(one: float, two: float) -> None:
    x_N3HW = 0.5 + 0.1 * (rgb() - 0.5)  # so near to grey that nothing is cut
    turned = turn_hues(x_N3HW, torch.full((4,), one))
    assert torch.allclose(turned.sum(1), x_N3HW.sum(1), atol=1e-5)
    again = turn_hues(turned, torch.full((4,), two))
    assert torch.allclose(again, turn_hues(x_N3HW, torch.full((4,), one + two)), atol=1e-4)
    grey = in_colour(images())
    assert torch.allclose(turn_hues(grey, torch.full((4,), one)), grey, atol=1e-6)


def test_a_third_of_a_turn_makes_green_of_red() -> None:
    x_N3HW = rgb()
    assert torch.allclose(turn_hues(x_N3HW, torch.full((4,), 120.0)), x_N3HW.roll(1, 1), atol=1e-6)


@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_every_experience_has_its_tint(strength: float) -> None:
    change, x_NHW = Transform({"kind": "coloured", "hues": [0, 240], "strength": strength}), images()
    for way, full in ((0, 0), (1, 2)):
        seen = change(x_NHW, LABELS, way, 0, "train")
        for channel in range(3):
            expected = x_NHW * (1 if channel == full else 1 - strength)
            assert torch.allclose(seen[:, channel], expected)


def test_colours_by_class_tell_the_class_in_training_and_nothing_in_the_test() -> None:
    change, labels = Transform({"kind": "coloured", "hues": [0, 120, 240], "by": "class"}), torch.arange(900)
    white = torch.ones(900, 2, 2)
    worn = [change(white, labels, way, 0, "train")[:, :, 0, 0].argmax(1) for way in range(6)]
    assert torch.equal(worn[0], labels % 3)
    for colours in worn:
        assert (
            len({(int(label) % 3, int(colour)) for label, colour in zip(labels, colours, strict=True)}) == 3
        )
    assert any(not torch.equal(colours, worn[0]) for colours in worn)
    free = change(white, labels, 0, 0, "test")[:, :, 0, 0].argmax(1)
    for label in range(3):
        assert torch.bincount(free[labels % 3 == label], minlength=3).min() > 60


def test_colour_as_a_corruption_is_another_for_every_image() -> None:
    change = Transform({"kind": "corrupted", "corruptions": ["clean", "blur", "colour"]})
    seen = [change(images(), LABELS, way, 0, "train") for way in range(3)]
    assert [part.shape for part in seen] == [(4, 3, 9, 9)] * 3
    assert torch.equal(seen[0], in_colour(images()))
    assert torch.equal(seen[1][:, 0], seen[1][:, 2])
    tints = seen[2][:, :, 4, 4] / images()[:, None, 4, 4]
    assert len({tuple(row) for row in (1000 * tints).round().int().tolist()}) == 4
    assert tints.min() >= 0.5 - 1e-6, "half of the strength"


@pytest.mark.parametrize(
    "options",
    [{"kind": "permuted"}, {"kind": "rotated", "degrees": [0, 90]}]
    + [{"kind": "corrupted", "corruptions": ["clean", way]} for way in ("blur", "contrast")],
)
def test_colour_images_change_channel_by_channel(options: dict) -> None:
    change, x_N3HW = (
        Transform(options),
        in_colour(images(4, 9, 9)) * torch.tensor([1.0, 0.5, 0.0]).view(3, 1, 1),
    )
    seen, grey = change(x_N3HW, LABELS, 1, 0, "train"), change(images(), LABELS, 1, 0, "train")
    if options.get("corruptions") != ["clean", "contrast"]:
        assert torch.allclose(seen[:, 0], grey, atol=1e-6)
        assert torch.allclose(seen[:, 1], grey / 2, atol=1e-6)
    assert torch.allclose(seen.mean((1, 2, 3)), x_N3HW.mean((1, 2, 3)), atol=0.05)
