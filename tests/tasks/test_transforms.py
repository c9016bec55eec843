"""Permuted, rotated and corrupted images, against numpy and scipy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from cl_moe.errors import InputError
from tasks.transforms import Transform, blur, rotate


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
        x_NHW, 0, 0, "train"
    )
    assert torch.allclose(flat.mean(dim=(1, 2)), x_NHW.mean(dim=(1, 2)), atol=1e-6)
    assert torch.allclose(flat.std(dim=(1, 2)), 0.55 * x_NHW.std(dim=(1, 2)), atol=1e-5)


def test_noise_is_as_strong_as_it_says_and_another_in_the_test_data() -> None:
    change = Transform({"kind": "corrupted", "corruptions": ["clean", "noise"], "severity": 0.25})
    grey_NHW = torch.full((50, 20, 20), 0.5)
    train, test = (change(grey_NHW, 1, 0, part) for part in ("train", "test"))
    assert (train - grey_NHW).std().item() == pytest.approx(0.15, rel=0.03)
    assert not torch.equal(train, test)
    assert torch.equal(train, change(grey_NHW, 1, 0, "train"))
    assert not torch.equal(train, change(grey_NHW, 1, 1, "train"))
    assert torch.equal(change(grey_NHW, 0, 0, "train"), grey_NHW)


@given(st.integers(0, 50), st.integers(0, 99))
def test_a_permutation_keeps_every_pixel(number: int, seed: int) -> None:
    x_NHW = images()
    moved = Transform({"kind": "permuted"})(x_NHW, number, seed, "train")
    assert torch.equal(moved.flatten(1).sort().values, x_NHW.flatten(1).sort().values)
    assert torch.equal(moved, x_NHW) == (number == 0)


@pytest.mark.parametrize("way", range(3))
def test_what_comes_out_is_an_image(way: int) -> None:
    changed = Transform({"kind": "corrupted", "corruptions": ["blur", "noise", "contrast"], "severity": 1})(
        images(), way, 0, "train"
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
    ],
)
def test_what_is_refused(options: object, key: str) -> None:
    with pytest.raises(InputError) as caught:
        Transform(options)  # type: ignore[arg-type]
    assert caught.value.key == key
