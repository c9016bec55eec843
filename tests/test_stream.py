"""The contract of a stream, cutting, and randomness by purpose."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import TensorDataset

from cl_moe.errors import InputError
from cl_moe.seeds import derive_seed, generator, seeded
from cl_moe.stream import Experience, Scenario, Stream, concatenate, cut, take


def data(rows: int, first: int = 0) -> TensorDataset:
    numbers = torch.arange(first, first + rows)
    return TensorDataset(numbers[:, None].float(), numbers)


def stream(*classes: tuple[int, ...], rows: int = 10, scenario: Scenario = "class") -> Stream:
    made = tuple(
        Experience(index, f"e{index}", data(rows, 100 * index), data(3, 100 * index + 50), group, index)
        for index, group in enumerate(classes)
    )
    return Stream("made", "classification", scenario, made, 10, (1,))


def test_it_is_a_sized_sequence() -> None:
    made = stream((0,), (1,), (2,))
    assert len(made) == 3
    assert [item.index for item in made] == [0, 1, 2]
    assert made[-1] is made.experiences[2]
    assert made[1:] == made.experiences[1:]
    assert made[0] in made


def test_it_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        stream((0,)).name = "other"  # type: ignore[misc]


def test_what_it_refuses() -> None:
    with pytest.raises(InputError) as caught:
        stream((0,), scenario="other")  # type: ignore[arg-type]
    assert caught.value.key == "stream.scenario"
    with pytest.raises(InputError, match="0 experiences"):
        stream()
    made = stream((0,), (1,))
    with pytest.raises(ValueError, match="experience 1 stands at position 0"):
        replace(made, experiences=made[::-1])


def test_class_groups_are_first_appearances() -> None:
    made = stream((3, 1), (1, 2), (3,), (0,))
    assert made.class_groups == ((3, 1), (2,), (0,))
    assert made.classes_at_start == ()
    assert replace(made, scenario="task").classes_at_start == made.class_groups
    assert stream((), ()).class_groups == ()


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 2**40))
def test_cut_keeps_every_example_once(rows: int, parts: int, seed: int) -> None:
    made = stream((0, 1), (2, 3), rows=rows)
    if parts > rows:
        with pytest.raises(InputError, match=f"1 .. {rows}"):
            cut(made, parts, seed)
        return
    shorter = cut(made, parts, seed)
    assert [item.index for item in shorter] == list(range(2 * parts))
    for item in made:
        mine = shorter[item.index * parts : (item.index + 1) * parts]
        joined = concatenate([part.train for part in mine]).tensors[1]
        assert joined.sort().values.tolist() == item.train.tensors[1].tolist()
        sizes = [len(part.train) for part in mine]
        assert max(sizes) - min(sizes) <= 1
        for part in mine:
            assert part.test is item.test
            assert (part.classes, part.task_label) == (item.classes, item.task_label)
            assert torch.equal(part.train.tensors[0][:, 0].long(), part.train.tensors[1])


def test_cut_depends_on_its_seed_alone() -> None:
    made = stream((0,), (1,), rows=40)
    first = [item.train.tensors[1].tolist() for item in cut(made, 4, 0)]
    torch.manual_seed(5)
    assert first == [item.train.tensors[1].tolist() for item in cut(made, 4, 0)]
    assert first != [item.train.tensors[1].tolist() for item in cut(made, 4, 1)]
    assert [row - 100 for row in first[4]] != first[0]  # each experience is dealt in its own way


def test_cut_into_one_changes_nothing() -> None:
    made = stream((0,))
    assert cut(made, 1, 0) is made


@pytest.mark.parametrize("parts", [0, -1])
def test_cut_refuses(parts: int) -> None:
    with pytest.raises(InputError) as caught:
        cut(stream((0,)), parts, 0)
    assert caught.value.key == "stream.cut"


def test_take_and_concatenate() -> None:
    taken = take(data(5), torch.tensor([4, 0, 0]))
    assert taken.tensors[1].tolist() == [4, 0, 0]
    assert taken.tensors[0].shape == (3, 1)
    joined = concatenate([data(2), data(3, 7)])
    assert joined.tensors[1].tolist() == [0, 1, 7, 8, 9]
    with pytest.raises(ValueError, match="zip"):
        concatenate([data(2), TensorDataset(torch.zeros(2, 1))])


WORDS = st.lists(st.integers() | st.text(), max_size=4)


@given(st.integers(), WORDS, st.integers(), WORDS)
def test_a_seed_depends_on_every_word(seed: int, words: list, other: int, others: list) -> None:
    derived = derive_seed(seed, *words)
    assert 0 <= derived < 2**63
    assert derived == derive_seed(seed, *words)
    if (seed, words) != (other, others):
        assert derived != derive_seed(other, *others)


def test_generators_are_apart() -> None:
    one, two = generator(0, "a"), generator(0, "b")
    first = torch.rand(3, generator=two)
    torch.rand(100, generator=one)
    assert torch.equal(first, torch.rand(3, generator=generator(0, "b")))
    assert not torch.equal(first, torch.rand(3, generator=generator(0, "a")))


def test_seeded_puts_the_global_state_back() -> None:
    before = torch.get_rng_state()
    with seeded(0, "weights"):
        inside = torch.rand(3)
    assert torch.equal(before, torch.get_rng_state())
    with seeded(0, "weights"):
        assert torch.equal(inside, torch.rand(3))


def test_seeded_puts_it_back_after_an_error() -> None:
    def fail() -> None:
        with seeded(0, "weights"):
            torch.rand(3)
            raise RuntimeError

    before = torch.get_rng_state()
    with pytest.raises(RuntimeError):
        fail()
    assert torch.equal(before, torch.get_rng_state())
