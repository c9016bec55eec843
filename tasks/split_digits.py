"""Split digits: the ten classes of scikit-learn's digits arrive in groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from cl_moe.errors import InputError
from cl_moe.stream import SCENARIOS, Experience, Scenario, Stream
from tasks.arrange import arrange, finish, whole
from tasks.sources import digits

_NUM_CLASSES = 10


def split_digits(
    scenario: str = "class",
    classes_per_experience: int = 2,
    order: Sequence[int] | None = None,
    seed: int | None = None,
    cut: int = 1,
    tune_on_first: int | None = None,
    data_seed: int = 0,
) -> Stream:
    """Consecutive groups of digit classes; inputs (n, 64) float32 in [0, 1], 1,437 train and 360 test images.

    Args:
        scenario: ``class``: labels 0 .. 9, no task label. ``task``: the same, ``task_label`` is the number of
            the group. ``domain``: a label is the place of a class within its group, so that all groups share
            the labels 0 .. classes_per_experience - 1 (van de Ven et al. 2022, split protocol).
        classes_per_experience: 1, 2, 5 or 10; a remainder is refused, never dropped. 1 only with ``class``:
            elsewhere nothing would be left to choose and any model would score 1.
        order: the classes in order of arrival, a permutation of 0 .. 9.
        seed: draws that order; null and no ``order``: 0, 1, .., 9.
        cut: how many shorter experiences each group is cut into.
        tune_on_first: keep only so many groups, for choosing hyperparameters; ``num_classes`` stays.
        data_seed: deals examples out to the parts of ``cut``. The train/test split never changes.

    Raises:
        InputError: a value that is not allowed.
    """
    if scenario not in SCENARIOS:
        raise InputError(got=f"{scenario!r}", allowed=", ".join(SCENARIOS), key="stream.scenario")
    size = _group_size(classes_per_experience, scenario)
    classes = arrange(range(_NUM_CLASSES), order, seed)
    images = digits()
    experiences = []
    for index, start in enumerate(range(0, _NUM_CLASSES, size)):
        group = classes[start : start + size]
        labels = list(range(size)) if scenario == "domain" else group
        experiences.append(
            Experience(
                index=index,
                name=f"digits {'-'.join(map(str, group))}",
                train=_choose(images.train_inputs, images.train_targets, group, labels),
                test=_choose(images.test_inputs, images.test_targets, group, labels),
                classes=tuple(labels),
                task_label=index if scenario == "task" else None,
            )
        )
    whole_stream = Stream(
        name="split_digits",
        kind="classification",
        scenario=cast(Scenario, scenario),
        experiences=tuple(experiences),
        num_classes=size if scenario == "domain" else _NUM_CLASSES,
        input_shape=tuple(images.train_inputs.shape[1:]),
    )
    return finish(whole_stream, tune_on_first, cut, data_seed)


def _group_size(classes_per_experience: int, scenario: str) -> int:
    key = "stream.classes_per_experience"
    low = 1 if scenario == "class" else 2
    divisors = [size for size in range(low, _NUM_CLASSES + 1) if _NUM_CLASSES % size == 0]
    size = whole(classes_per_experience, key, what=f"one of {divisors}")
    if size not in divisors:
        raise InputError(
            got=f"{size} classes per experience of {_NUM_CLASSES} classes in scenario {scenario!r}",
            allowed=", ".join(map(str, divisors)),
            key=key,
        )
    return size


def _choose(inputs: Tensor, targets: Tensor, group: Sequence[int], labels: Sequence[int]) -> TensorDataset:
    """The rows of some classes, in the order of the data, each class under its label."""
    label_of = torch.full((_NUM_CLASSES,), -1)
    label_of[torch.tensor(group)] = torch.tensor(labels)
    rows = (label_of[targets] >= 0).nonzero().squeeze(1)
    return TensorDataset(inputs[rows], label_of[targets[rows]])
