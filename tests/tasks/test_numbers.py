"""Shapes of time on a stream of numbers: what needs classes refuses it, the rest loses no example."""

from __future__ import annotations

import pytest
import torch

from cl_moe.errors import InputError
from tasks.arrange import finish
from tests.number_runs import numbers


@pytest.mark.parametrize("shape", [{"imbalance": 0.5}, {"label_noise": 0.1}])
def test_what_changes_classes_is_refused(shape: dict[str, object]) -> None:
    with pytest.raises(InputError, match="on a regression stream") as refused:
        finish(numbers(), None, 1, 0, shape)
    assert refused.value.key == "stream.shape"


@pytest.mark.parametrize(
    ("shape", "count"),
    [
        (None, 3),
        ({"validation": 0.25}, 3),
        ({"blurry": 0.2}, 3),
        ({"recurring": 2}, 6),
        ({"parts": 4}, 4),
        ({"parts": 5, "drift": "linear"}, 5),
    ],
)
def test_every_example_comes_once(shape: dict[str, object] | None, count: int) -> None:
    whole, shaped = numbers(), finish(numbers(), None, 1, 0, shape)
    assert len(shaped) == count
    came = [row for e in shaped for row in e.train.tensors[1].flatten().tolist()]
    there = [row for e in whole for row in e.train.tensors[1].flatten().tolist()]
    if shape is not None and "validation" in shape:
        came += [row for e in shaped for row in e.test.tensors[1].flatten().tolist()]
        assert [len(e.test) for e in shaped] == [10, 10, 10]
    assert sorted(came) == sorted(there)
    assert all(e.classes == () for e in shaped)
    assert all(e.train.tensors[1].dtype == torch.float32 for e in shaped)
