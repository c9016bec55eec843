"""Scores of batches and their running mean, against loops over examples."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given
from hypothesis import strategies as st

from cl_moe.metrics.answers import OnlineScore, token_score
from cl_moe.seeds import generator
from cl_moe.stream import IGNORE


@given(st.lists(st.tuples(st.floats(-50, 50), st.integers(1, 9)), min_size=1, max_size=9), st.integers(0, 9))
def test_the_mean_weighs_every_example_once_and_goes_on_after_a_stop(batches, stop):
    through, first, second = OnlineScore(), OnlineScore(), OnlineScore()
    for place, (total, count) in enumerate(batches):
        through.add(torch.tensor(total, dtype=torch.float64), torch.tensor(count))
        if place == min(stop, len(batches) - 1):
            second.load_state_dict(first.state_dict())
            first = second
        first.add(torch.tensor(total, dtype=torch.float64), count)
    assert first.mean == through.mean
    expected = sum(total for total, _ in batches) / sum(count for _, count in batches)
    assert through.mean == pytest.approx(expected, abs=1e-12)
    assert all(isinstance(value, float | int) for value in through.state_dict().values())


def test_of_nothing_it_is_undefined():
    online = OnlineScore()
    assert online.mean != online.mean
    online.add(torch.tensor(1.0), 2)
    online.reset()
    assert online.mean != online.mean


def test_tokens_score_minus_their_loss_and_padding_none():
    logits = torch.randn(2, 3, 5, generator=generator(0, "logits"))
    targets = torch.tensor([[1, 4, IGNORE], [0, IGNORE, IGNORE]])
    total, count = token_score(logits, targets)
    each = [F.cross_entropy(logits[b, s].double(), targets[b, s]).item() for b, s in ((0, 0), (0, 1), (1, 0))]
    assert count == 3
    assert total.item() == pytest.approx(-sum(each), rel=1e-6)
