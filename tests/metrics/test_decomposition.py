"""Forgetting told apart, against plain Python."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cl_moe.errors import InputError
from cl_moe.metrics.functional import (
    backward_transfer,
    decomposed_forgetting,
    forgetting_routing,
    forgetting_weights,
)

SCORES = st.floats(-10, 1, width=32)


@given(st.integers(1, 5), st.data())
def test_two_parts_of_what_was_lost(T, data):
    R = data.draw(arrays(np.float64, (T + 1, T), elements=SCORES))
    rewound = data.draw(arrays(np.float64, (T,), elements=SCORES))
    parts = decomposed_forgetting(torch.from_numpy(R), torch.from_numpy(rewound))
    for c in range(T - 1):
        assert parts.weights[c].item() == R[c + 1, c] - rewound[c]
        assert parts.routing[c].item() == rewound[c] - R[T, c]
    weights = forgetting_weights(torch.from_numpy(R), torch.from_numpy(rewound)).item()
    routing = forgetting_routing(torch.from_numpy(R), torch.from_numpy(rewound)).item()
    if T == 1:
        assert math.isnan(weights)
        assert math.isnan(routing)
    else:
        assert weights + routing == pytest.approx(-backward_transfer(torch.from_numpy(R)).item(), abs=1e-12)


@given(arrays(np.float64, (4, 3), elements=SCORES))
def test_a_router_that_stood_still_forgot_nothing_and_neither_did_weights_that_did(R):
    R = torch.from_numpy(R)
    assert forgetting_routing(R, R[-1]).item() == 0
    assert forgetting_weights(R, R.diagonal(offset=-1)).item() == 0


def test_an_experience_without_a_router_of_then_leaves_it_undefined():
    R = torch.rand(4, 3, dtype=torch.float64)
    assert math.isnan(forgetting_weights(R, torch.tensor([math.nan, 0.5, 0.5])).item())
    assert not math.isnan(forgetting_weights(R, torch.tensor([0.5, 0.5, math.nan])).item())


@pytest.mark.parametrize(("R", "rewound"), [((3, 3), (3,)), ((4, 3), (2,)), ((4,), (4,))])
def test_shapes_are_checked(R, rewound):
    with pytest.raises(InputError, match="rewound"):
        decomposed_forgetting(torch.zeros(R), torch.zeros(rewound))
