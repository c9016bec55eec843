"""One name for the three scenarios that other platforms were measured in."""

from __future__ import annotations

import pytest
import torch

from cl_moe.errors import InputError
from tasks.peers_digits import peers_digits
from tasks.split_digits import split_digits


@pytest.mark.parametrize("scenario", ["class", "task"])
def test_two_digits_at_a_time(scenario: str) -> None:
    stream, other = peers_digits(scenario), split_digits(scenario)
    assert [e.classes for e in stream] == [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
    assert [e.task_label for e in stream] == [e.task_label for e in other]
    for experience, one in zip(stream, other, strict=True):
        assert torch.equal(experience.train.tensors[0], one.train.tensors[0])


def test_five_permutations_of_all_ten_and_the_first_is_the_identity() -> None:
    stream, plain = peers_digits("domain"), peers_digits("class")
    assert {e.classes for e in stream} == {tuple(range(10))}
    assert [len(e.train) for e in stream] == [1437] * 5

    def images(inputs: torch.Tensor) -> list[tuple[float, ...]]:
        return sorted(tuple(row.tolist()) for row in inputs)

    assert images(stream[0].train.tensors[0]) == images(torch.cat([e.train.tensors[0] for e in plain]))
    for experience in stream[1:]:
        assert not torch.equal(experience.train.tensors[0], stream[0].train.tensors[0])
        sorted_pixels = [e.train.tensors[0].sort(dim=1).values for e in (experience, stream[0])]
        assert images(sorted_pixels[0]) == images(sorted_pixels[1])


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(InputError, match=r"stream\.scenario"):
        peers_digits("classes")
