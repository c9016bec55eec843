"""The order of a stream and the numbers it is built from."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import TensorDataset

from cl_moe.errors import InputError
from cl_moe.stream import Experience, Stream
from tasks.arrange import arrange, finish, whole


def stream(count: int) -> Stream:
    data = TensorDataset(torch.arange(6.0)[:, None], torch.zeros(6, dtype=torch.int64))
    made = tuple(Experience(index, str(index), data, data, (index,)) for index in range(count))
    return Stream("made", "classification", "class", made, count, (1,))


@given(st.lists(st.integers(), unique=True, max_size=12), st.integers(0, 2**40))
def test_a_drawn_order_is_a_permutation_and_stays(items: list[int], seed: int) -> None:
    drawn = arrange(items, None, seed)
    assert sorted(drawn) == sorted(items)
    assert drawn == arrange(items, None, seed)


def test_different_seeds_draw_different_orders() -> None:
    assert len({tuple(arrange(range(10), None, seed)) for seed in range(20)}) == 20


@given(st.permutations(range(6)))
def test_an_explicit_order_is_taken_as_it_is(order: list[int]) -> None:
    assert arrange(range(6), order, None) == order
    assert arrange(range(6), tuple(order), None) == order


def test_without_order_and_seed_the_natural_order() -> None:
    assert arrange("abc", None, None) == ["a", "b", "c"]


@pytest.mark.parametrize("order", [[], [0, 1], [0, 1, 1], [0, 1, 2, 3], [1, 2, 3], "012", 3, [[0], [1], [2]]])
def test_what_is_no_permutation_is_refused(order: object) -> None:
    with pytest.raises(InputError) as caught:
        arrange(range(3), order, None)  # type: ignore[arg-type]
    assert caught.value.key == "stream.order"
    assert "[0, 1, 2]" in caught.value.allowed


def test_order_and_seed_together_are_refused() -> None:
    with pytest.raises(InputError, match="one of them") as caught:
        arrange(range(3), [2, 1, 0], 0)
    assert "stream.order" in caught.value.key
    assert "seed.order" in caught.value.key


@pytest.mark.parametrize("seed", ["a", 1.5, True])
def test_a_seed_is_a_whole_number(seed: object) -> None:
    with pytest.raises(InputError, match=r"seed\.order"):
        arrange(range(3), None, seed)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [0, 6, 2.0, "2", None, True, float("nan")])
def test_whole_refuses(value: object) -> None:
    with pytest.raises(InputError, match=r"whole number in 1 \.\. 5, so many") as caught:
        whole(value, "stream.cut", 1, 5, "so many")
    assert caught.value.got == repr(value)


def test_finish_keeps_the_first_then_cuts() -> None:
    made = finish(stream(4), tune_on_first=2, parts=3, data_seed=0)
    assert [item.name for item in made] == [f"{name} ({part}/3)" for name in "01" for part in (1, 2, 3)]
    assert made.num_classes == 4


def test_a_stream_is_finished_alike_whether_kept_whole_or_not() -> None:
    short, long = finish(stream(4), 2, 2, 7), finish(stream(4), None, 2, 7)
    for one, two in zip(short, long[:4], strict=True):
        assert torch.equal(one.train.tensors[0], two.train.tensors[0])


@pytest.mark.parametrize("kept", [0, -1, 5, 1.5, "all"])
def test_tune_on_first_out_of_range(kept: object) -> None:
    with pytest.raises(InputError, match=r"1 \.\. 4") as caught:
        finish(stream(4), kept, 1, 0)  # type: ignore[arg-type]
    assert caught.value.key == "stream.tune_on_first"


@pytest.mark.parametrize("parts", [0, -2, 7, 2.5, None])
def test_cut_out_of_range(parts: object) -> None:
    with pytest.raises(InputError) as caught:
        finish(stream(2), None, parts, 0)  # type: ignore[arg-type]
    assert caught.value.key == "stream.cut"


def test_the_data_seed_is_a_whole_number() -> None:
    with pytest.raises(InputError, match=r"seed\.data"):
        finish(stream(2), None, 1, None)  # type: ignore[arg-type]
