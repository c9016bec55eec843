"""Split digits: nothing lost, doubled or leaked; the three scenarios; what is refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cl_moe.errors import InputError
from tasks.sources import digits
from tasks.split_digits import split_digits

Rows = Callable[..., "Counter[bytes]"]
SIZES = st.sampled_from([1, 2, 5, 10])
ORDERS = st.one_of(
    st.fixed_dictionaries({}),
    st.fixed_dictionaries({"seed": st.integers(0, 2**32)}),
    st.fixed_dictionaries({"order": st.permutations(range(10))}),
)


@settings(max_examples=12, deadline=None)
@given(size=SIZES, how=ORDERS, cut=st.integers(1, 7), data_seed=st.integers(0, 2**32))
def test_every_image_arrives_exactly_once(rows: Rows, size: int, how: dict, cut: int, data_seed: int) -> None:
    stream = split_digits(classes_per_experience=size, cut=cut, data_seed=data_seed, **how)
    images = digits()
    all_train = torch.utils.data.TensorDataset(images.train_inputs, images.train_targets)
    all_test = torch.utils.data.TensorDataset(images.test_inputs, images.test_targets)
    assert len(stream) == 10 // size * cut
    assert rows(item.train for item in stream) == rows([all_train])
    assert rows(item.test for item in stream[::cut]) == rows([all_test])
    for item in stream:
        assert item.test is stream[item.index // cut * cut].test
        assert set(item.test.tensors[1].tolist()) == set(item.classes)
        assert set(item.train.tensors[1].tolist()) <= set(item.classes)


def test_train_and_test_are_the_protocols_and_share_no_image() -> None:
    images = digits()
    assert (len(images.train_targets), len(images.test_targets)) == (1437, 360)
    train = Counter(row.numpy().tobytes() for row in images.train_inputs)
    test = Counter(row.numpy().tobytes() for row in images.test_inputs)
    assert not train & test
    counts = torch.bincount(images.test_targets)
    assert counts.min() >= 34  # stratified
    assert counts.max() <= 37


def test_shapes_types_and_range() -> None:
    stream = split_digits()
    assert (len(stream), stream.num_classes, stream.input_shape, stream.kind) == (
        5,
        10,
        (64,),
        "classification",
    )
    for item in stream:
        for inputs, targets in (item.train.tensors, item.test.tensors):
            assert inputs.shape == (len(targets), 64)
            assert inputs.dtype == torch.float32
            assert targets.dtype == torch.int64
            assert inputs.min() >= 0
            assert inputs.max() == 1
    assert [item.name for item in stream][:2] == ["digits 0-1", "digits 2-3"]


def test_same_arguments_same_bytes() -> None:
    one, two = (split_digits(seed=3, cut=3, data_seed=4) for _ in range(2))
    for a, b in zip(one, two, strict=True):
        assert a.name == b.name
        for x, y in zip(a.train.tensors + a.test.tensors, b.train.tensors + b.test.tensors, strict=True):
            assert torch.equal(x, y)


def test_order_moves_classes() -> None:
    stream = split_digits(order=[9, 0, 8, 1, 7, 2, 6, 3, 5, 4])
    assert [item.classes for item in stream] == [(9, 0), (8, 1), (7, 2), (6, 3), (5, 4)]
    assert stream[0].name == "digits 9-0"
    assert split_digits(seed=1).class_groups != split_digits(seed=2).class_groups


@settings(max_examples=8, deadline=None)
@given(size=st.sampled_from([2, 5, 10]), how=ORDERS)
def test_domain_shares_its_labels(size: int, how: dict) -> None:
    by_class = split_digits("class", size, **how)
    by_domain = split_digits("domain", size, **how)
    assert by_domain.num_classes == size
    for true, shared in zip(by_class, by_domain, strict=True):
        assert shared.classes == tuple(range(size))
        assert shared.task_label is None
        assert torch.equal(true.train.tensors[0], shared.train.tensors[0])
        assert torch.equal(torch.tensor(true.classes)[shared.train.tensors[1]], true.train.tensors[1])
        assert torch.equal(torch.tensor(true.classes)[shared.test.tensors[1]], true.test.tensors[1])


def test_task_labels_only_in_the_task_scenario() -> None:
    assert [item.task_label for item in split_digits("task")] == [0, 1, 2, 3, 4]
    assert [item.task_label for item in split_digits("task", cut=2)] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert {item.task_label for item in split_digits("class")} == {None}
    assert [item.classes for item in split_digits("task")] == [item.classes for item in split_digits("class")]


def test_tune_on_first_is_the_beginning_of_the_whole() -> None:
    whole, first = split_digits(seed=5), split_digits(seed=5, tune_on_first=2)
    assert len(first) == 2
    assert first.num_classes == 10
    assert [item.name for item in first] == [item.name for item in whole[:2]]


@pytest.mark.parametrize("size", [3, 4, 6, 0, -2, 11, 20, 2.0, "2"])
def test_a_remainder_is_refused_not_dropped(size: object) -> None:
    with pytest.raises(InputError, match="1, 2, 5, 10") as caught:
        split_digits(classes_per_experience=size)  # type: ignore[arg-type]
    assert caught.value.key == "stream.classes_per_experience"


@pytest.mark.parametrize("scenario", ["task", "domain"])
def test_one_class_leaves_nothing_to_choose(scenario: str) -> None:
    with pytest.raises(InputError) as caught:
        split_digits(scenario, classes_per_experience=1)
    assert caught.value.allowed == "2, 5, 10"


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"scenario": "classes"}, "stream.scenario"),
        ({"scenario": None}, "stream.scenario"),
        ({"order": [0, 1]}, "stream.order"),
        ({"cut": 300}, "stream.cut"),
        ({"tune_on_first": 6}, "stream.tune_on_first"),
        ({"data_seed": "x"}, "seed.data"),
    ],
)
def test_what_else_is_refused(arguments: dict, key: str) -> None:
    with pytest.raises(InputError) as caught:
        split_digits(**arguments)
    assert caught.value.key == key
    assert caught.value.got
    assert caught.value.allowed


def test_the_labels_belong_to_the_images() -> None:
    images = digits()
    means = torch.stack([images.train_inputs[images.train_targets == label].mean(0) for label in range(10)])
    nearest = torch.cdist(images.test_inputs, means).argmin(1)
    assert (nearest == images.test_targets).double().mean() > 0.85
    from sklearn.linear_model import LogisticRegression

    stream = split_digits(order=[3, 1, 4, 5, 9, 2, 6, 8, 7, 0])
    train = [np.concatenate([item.train.tensors[part].numpy() for item in stream]) for part in (0, 1)]
    test = [np.concatenate([item.test.tensors[part].numpy() for item in stream]) for part in (0, 1)]
    assert LogisticRegression(max_iter=300).fit(*train).score(*test) > 0.9


def test_offline(no_network: None) -> None:
    assert len(split_digits()) == 5
