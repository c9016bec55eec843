"""A plan of growths is refused before training exactly where one of them could not be carried out."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cl_moe.errors import InputError
from cl_moe.growth.checks import check_growth
from cl_moe.growth.schedules import At
from cl_moe.layers import PEER, Retrieval
from cl_moe.models import MLPClassifier
from tests.layers.product_key_oracle import OPTIONS, make

SIZES = [1, 3, 4, 5, 7, 9, 11, 16, 20, 24, 25, 33, 65]


def refused(act) -> bool:
    try:
        act()
    except InputError as error:
        return error.key == "growth.num_experts"
    return False


@given(
    *(st.sampled_from(OPTIONS[name]) for name in ("queries", "policy", "grow_by")),
    st.sampled_from([4, 9, 16]),
    st.lists(st.sampled_from(SIZES), min_size=1, max_size=3),
    st.sampled_from(["fresh", "copy", "zero_output"]),
    st.sampled_from([1, 3, 4]),
)
def test_the_check_says_what_growing_would(queries, policy, grow_by, start, sizes, init, k):
    layer = make("pkm", Retrieval("shared", queries, "softmax", policy, grow_by), num_experts=start, k=k)

    def grow_all() -> None:
        for size in sizes:
            layer.grow(size, init)

    foreseen = refused(lambda: layer.check_growths(sizes, init))
    assert layer.num_experts == start, "a check changes nothing"
    assert foreseen == refused(grow_all)


@pytest.mark.parametrize(
    ("retrieval", "k", "init", "size"),
    [
        (Retrieval(grow_by="shell"), 4, "copy", 65),  # 5 rows from 4
        (Retrieval(grow_by="shell", policy="sum"), 16, "fresh", 9),
    ],
)
def test_a_run_hears_of_it_before_it_trains(retrieval: Retrieval, k: int, init: str, size: int):
    torch.manual_seed(0)
    layer = partial(PEER, num_experts=16, heads=1, k=k, retrieval=retrieval)
    model = MLPClassifier((4,), 2, layer, width=8)
    with pytest.raises(InputError) as caught:
        check_growth(model, At({1: size}, init=init), 3)
    assert caught.value.key == "growth.num_experts"
