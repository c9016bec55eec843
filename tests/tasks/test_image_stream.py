"""Streams of images: sets, groups of classes, transformations; and image files that are damaged."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import RidgeClassifier

from cl_moe.errors import InputError
from tasks.image_stream import image_stream
from tasks.images import images, read_images
from tasks.permuted_digits import permuted_digits
from tasks.split_digits import split_digits
from tasks.transforms import Transform, permutation, rotate

PLAUSIBLE = {"digits": 0.90, "mnist": 0.82, "fashion_mnist": 0.78}


@pytest.mark.parametrize("name", PLAUSIBLE)
def test_a_linear_model_finds_the_classes(name: str, with_data: Callable[[str], None]) -> None:
    if name == "fashion_mnist":
        with_data("fashion_mnist_10k.npz")
    data = images(name)
    (inputs, targets), (others, expected) = data.train.tensors, data.test.tensors
    model = RidgeClassifier(alpha=10.0).fit(inputs.flatten(1).numpy(), targets.numpy())
    assert PLAUSIBLE[name] < model.score(others.flatten(1).numpy(), expected.numpy()) < 0.98
    assert (inputs.min(), inputs.max()) == (0, 1)


def test_omniglot_has_its_characters(with_data: Callable[[str], None]) -> None:
    with_data("omniglot_small_28.npz")
    stream = image_stream("omniglot", classes_per_experience=22)
    assert (len(stream), stream.num_classes, stream.input_shape) == (11, 242, (28, 28))


@pytest.mark.parametrize("scenario", ["class", "task", "domain"])
def test_groups_of_classes_are_those_of_the_set(scenario: str) -> None:
    data = images("mnist")
    stream = image_stream("mnist", scenario, 5, order=[9, 8, 7, 6, 5, 4, 3, 2, 1, 0])
    for index, (experience, group) in enumerate(zip(stream, ([9, 8, 7, 6, 5], [4, 3, 2, 1, 0]), strict=True)):
        assert experience.task_label == (index if scenario == "task" else None)
        for side, whole in ((experience.train, data.train), (experience.test, data.test)):
            inputs, targets = side.tensors
            mine = torch.isin(whole.tensors[1], torch.tensor(group))
            assert torch.equal(inputs, whole.tensors[0][mine])
            real = [group[label] for label in targets.tolist()] if scenario == "domain" else targets.tolist()
            assert real == whole.tensors[1][mine].tolist()


def test_a_whole_set_is_seen_in_one_way_after_the_other() -> None:
    data, degrees = images("mnist"), [0, 40, 10]
    options = {"kind": "rotated", "degrees": degrees}
    stream = image_stream("mnist", "domain", None, options, order=[2, 0, 1])
    assert [e.name for e in stream] == ["10 degrees", "0 degrees", "40 degrees"]
    for experience, way in zip(stream, (2, 0, 1), strict=True):
        for side, whole in ((experience.train, data.train), (experience.test, data.test)):
            assert torch.equal(side.tensors[1], whole.tensors[1])
            assert torch.equal(side.tensors[0], rotate(whole.tensors[0], degrees[way]))


def test_groups_may_be_seen_each_in_its_way() -> None:
    plain, moved = split_digits(), image_stream("digits", transform={"kind": "permuted"}, data_seed=3)
    for index, (one, two) in enumerate(zip(plain, moved, strict=True)):
        pixels = permutation(index, 64, 3)
        assert torch.equal(two.train.tensors[0], one.train.tensors[0][:, pixels])
        assert torch.equal(two.test.tensors[0], one.test.tensors[0][:, pixels])
        assert two.name == f"{one.name}, permutation {index}"


def test_flat_digits_turn_like_squares() -> None:
    (turned,) = image_stream("digits", "domain", None, {"kind": "rotated", "degrees": [90]})
    flat = images("digits").train.tensors[0]
    assert torch.allclose(
        turned.train.tensors[0].view(-1, 8, 8), torch.rot90(flat.view(-1, 8, 8), 1, (1, 2)), atol=1e-5
    )


def test_the_digits_streams_are_special_cases() -> None:
    mine = inspect.signature(image_stream).parameters
    for special in (split_digits, permuted_digits):
        assert set(inspect.signature(special).parameters) <= set(mine)
    pairs = [
        (split_digits("task", 5, seed=1, cut=2), image_stream("digits", "task", 5, seed=1, cut=2)),
        (permuted_digits(3, seed=2), image_stream("digits", "domain", None, {"kind": "permuted"}, 3, seed=2)),
    ]
    for one, two in pairs:
        for a, b in zip(one, two, strict=True):
            assert (a.name, a.classes) == (b.name, b.classes)
            assert all(map(torch.equal, a.train.tensors, b.train.tensors))


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"dataset": "cats"}, "stream.dataset"),
        ({"scenario": "none"}, "stream.scenario"),
        ({"classes_per_experience": 3}, "stream.classes_per_experience"),
        ({"scenario": "task", "classes_per_experience": 1}, "stream.classes_per_experience"),
        ({"num_experiences": 3}, "stream.num_experiences"),
        ({"transform": {"kind": "rotated", "degrees": [0, 1]}}, "stream.transform"),
        ({"order": [0, 1]}, "stream.order"),
        (
            {"classes_per_experience": None, "scenario": "domain"},
            "stream.scenario, stream.transform or stream",
        ),
        (
            {"classes_per_experience": None, "transform": {"kind": "permuted"}},
            "stream.scenario, stream.transform",
        ),
        (
            {
                "classes_per_experience": None,
                "transform": {"kind": "rotated"},
                "scenario": "domain",
                "num_experiences": 2,
            },
            "stream.num_experiences",
        ),
    ],
)
def test_what_is_refused(arguments: dict[str, Any], key: str) -> None:
    with pytest.raises(InputError) as caught:
        image_stream(**{"dataset": "digits", **arguments})
    assert caught.value.key.startswith(key)


GOOD = {
    "x_train": np.zeros((4, 3, 3), np.uint8),
    "y_train": np.array([0, 1, 0, 1]),
    "x_test": np.zeros((2, 3, 3), np.uint8),
    "y_test": np.array([0, 1]),
}


def test_an_archive_is_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "good.npz", **GOOD)
    data = read_images(tmp_path / "good.npz", ("a", "b"))
    assert (data.input_shape, data.classes, len(data.train), len(data.test)) == ((3, 3), ("a", "b"), 4, 2)


@pytest.mark.parametrize(
    "change",
    [
        {"x_train": np.zeros((4, 3, 3))},
        {"x_test": np.zeros((2, 9), np.uint8)},
        {"y_train": np.array([0, 1])},
        {"y_test": np.array([0, 2])},
        {"y_test": np.array([0, -1])},
        {"x_train": np.array([{}] * 4)},
        {"x_train": None},
    ],
)
def test_an_archive_of_something_else_is_named(tmp_path: Path, change: dict[str, Any]) -> None:
    arrays = {name: array for name, array in {**GOOD, **change}.items() if array is not None}
    np.savez(tmp_path / "odd.npz", **arrays)
    with pytest.raises(InputError, match=r"odd\.npz"):
        read_images(tmp_path / "odd.npz", ("a", "b"))


@pytest.mark.parametrize("kept", [0, 100, 0.5])
def test_a_cut_off_archive_is_named(tmp_path: Path, kept: float) -> None:
    np.savez(tmp_path / "whole.npz", **GOOD)
    content = (tmp_path / "whole.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(content[: int(kept * len(content)) if kept < 1 else int(kept)])
    with pytest.raises(InputError, match=r"cut\.npz"):
        read_images(tmp_path / "cut.npz", ("a", "b"))


def test_a_set_that_is_not_there_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"fashion_mnist_10k\.npz \(.* folder that CL_MOE_DATA names"):
        images("fashion_mnist")
    with pytest.raises(
        InputError, match=r"omniglot_small_28\.npz \(.*class_names; made of github\.com/brendenlake/omniglot"
    ):
        images("omniglot")


def test_noise_differs_between_training_and_test_images() -> None:
    change = Transform({"kind": "corrupted", "corruptions": ["noise"]})
    (experience,) = image_stream("digits", "domain", None, {"kind": "corrupted", "corruptions": ["noise"]})
    data = images("digits")
    expected = change(data.test.tensors[0].view(-1, 8, 8), data.test.tensors[1], 0, 0, "test").flatten(1)
    assert torch.equal(experience.test.tensors[0], expected)
