"""Permuted digits: all ten classes in every experience, the pixels in another fixed order each time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from cl_moe.errors import InputError
from cl_moe.seeds import generator
from cl_moe.stream import Experience, Stream
from tasks.arrange import arrange, finish, whole
from tasks.sources import digits


def permuted_digits(
    num_experiences: int = 5,
    scenario: str = "domain",
    order: Sequence[int] | None = None,
    seed: int | None = None,
    cut: int = 1,
    tune_on_first: int | None = None,
    data_seed: int = 0,
) -> Stream:
    """Fixed pixel permutations of scikit-learn's digits; inputs (n, 64) float32 in [0, 1], labels 0 .. 9.

    Args:
        num_experiences: how many permutations, at least 1. Permutation 0 is the identity.
        scenario: ``domain`` only. The labels are the same in every experience, so there is neither a class to
            arrive nor a choice that a task label would narrow.
        order: the permutations in order of arrival, a permutation of 0 .. num_experiences - 1.
        seed: draws that order; null and no ``order``: 0, 1, 2, ..
        cut: how many shorter experiences each is cut into.
        tune_on_first: keep only so many permutations, for choosing hyperparameters.
        data_seed: draws the permutations, and deals examples out to the parts of ``cut``.

    Raises:
        InputError: a value that is not allowed.
    """
    if scenario != "domain":
        raise InputError(
            got=f"{scenario!r}",
            allowed="domain: every experience has the same ten classes",
            key="stream.scenario",
        )
    count = whole(num_experiences, "stream.num_experiences", 1)
    numbers = arrange(range(count), order, seed)
    whole(data_seed, "seed.data")
    images = digits()
    num_pixels = images.train_inputs.shape[1]
    experiences = []
    for index, number in enumerate(numbers):
        pixels = permutation(number, num_pixels, data_seed)
        experiences.append(
            Experience(
                index=index,
                name=f"permutation {number}",
                train=TensorDataset(images.train_inputs[:, pixels], images.train_targets.clone()),
                test=TensorDataset(images.test_inputs[:, pixels], images.test_targets.clone()),
                classes=tuple(range(10)),
            )
        )
    whole_stream = Stream(
        name="permuted_digits",
        kind="classification",
        scenario="domain",
        experiences=tuple(experiences),
        num_classes=10,
        input_shape=(num_pixels,),
    )
    return finish(whole_stream, tune_on_first, cut, data_seed)


def permutation(number: int, num_pixels: int, data_seed: int) -> Tensor:
    """Where each pixel of permutation ``number`` comes from: (num_pixels,) int64; number 0 is the identity.

    It depends on its number and the seed alone: a longer stream begins with the same permutations.
    """
    if number == 0:
        return torch.arange(num_pixels)
    return torch.randperm(num_pixels, generator=generator(data_seed, number, "permutation"))
