"""Permuted digits: the same images under permutations that are fixed by their number and the data seed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import TensorDataset

from cl_moe.errors import InputError
from tasks.permuted_digits import permuted_digits
from tasks.sources import digits
from tasks.transforms import permutation

Rows = Callable[..., "Counter[bytes]"]


@settings(max_examples=8, deadline=None)
@given(
    count=st.integers(1, 6),
    seed=st.none() | st.integers(0, 99),
    cut=st.integers(1, 5),
    data=st.integers(0, 99),
)
def test_every_image_arrives_once_per_permutation(
    rows: Rows, count: int, seed: int | None, cut: int, data: int
) -> None:
    stream = permuted_digits(count, seed=seed, cut=cut, data_seed=data)
    images = digits()
    assert len(stream) == count * cut
    for first in range(0, len(stream), cut):
        parts = stream[first : first + cut]
        back = permutation(int(parts[0].name.split()[1]), 64, data).argsort()
        train = [TensorDataset(part.train.tensors[0][:, back], part.train.tensors[1]) for part in parts]
        assert rows(train) == rows([TensorDataset(images.train_inputs, images.train_targets)])
        assert torch.equal(parts[0].test.tensors[0][:, back], images.test_inputs)
        assert torch.equal(parts[0].test.tensors[1], images.test_targets)
        assert all(part.classes == tuple(range(10)) and part.task_label is None for part in parts)


def test_the_first_is_the_identity_the_others_differ() -> None:
    stream = permuted_digits(5)
    assert torch.equal(stream[0].train.tensors[0], digits().train_inputs)
    assert len({tuple(permutation(number, 64, 0).tolist()) for number in range(50)}) == 50
    assert (stream.scenario, stream.num_classes, stream.input_shape) == ("domain", 10, (64,))


@given(st.integers(0, 1000), st.integers(0, 2**40))
def test_a_permutation_is_one(number: int, seed: int) -> None:
    drawn = permutation(number, 64, seed)
    assert sorted(drawn.tolist()) == list(range(64))
    assert torch.equal(drawn, permutation(number, 64, seed))


def test_a_longer_stream_begins_like_a_shorter_one() -> None:
    for short, long in zip(permuted_digits(3), permuted_digits(6)[:3], strict=True):
        assert torch.equal(short.train.tensors[0], long.train.tensors[0])


def test_order_moves_permutations_and_leaves_them_alone() -> None:
    natural, moved = permuted_digits(3), permuted_digits(3, order=[2, 0, 1])
    assert [item.name for item in moved] == ["permutation 2", "permutation 0", "permutation 1"]
    assert [item.index for item in moved] == [0, 1, 2]
    assert torch.equal(natural[2].test.tensors[0], moved[0].test.tensors[0])


def test_the_data_seed_draws_the_permutations() -> None:
    one, two = permuted_digits(2, data_seed=0), permuted_digits(2, data_seed=1)
    assert torch.equal(one[0].train.tensors[0], two[0].train.tensors[0])
    assert not torch.equal(one[1].train.tensors[0], two[1].train.tensors[0])


def test_nothing_is_shared_in_memory() -> None:
    one, two = permuted_digits(2)
    one.train.tensors[1].fill_(7)
    assert two.train.tensors[1].unique().numel() == 10


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"num_experiences": 0}, "stream.num_experiences"),
        ({"num_experiences": 2.5}, "stream.num_experiences"),
        ({"scenario": "class"}, "stream.scenario"),
        ({"scenario": "task"}, "stream.scenario"),
        ({"order": [0, 1, 2]}, "stream.order"),
        ({"order": [0, 1, 2, 3, 4], "seed": 1}, "stream.order or seed.order"),
        ({"cut": 0}, "stream.cut"),
        ({"tune_on_first": 0}, "stream.tune_on_first"),
        ({"data_seed": None}, "seed.data"),
    ],
)
def test_what_is_refused(arguments: dict, key: str) -> None:
    with pytest.raises(InputError) as caught:
        permuted_digits(**arguments)
    assert caught.value.key == key


def test_offline(no_network: None) -> None:
    assert len(permuted_digits()) == 5
