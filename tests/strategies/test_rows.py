"""Strategies beside gradients of rows: they do what they do with dense ones, or are refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

from cl_moe.errors import InputError
from cl_moe.layers import PEER
from cl_moe.layers.tables import ExpertTable
from cl_moe.learner import Learner
from cl_moe.models import MLPClassifier
from cl_moe.optim import SGD
from cl_moe.seeds import seeded
from cl_moe.strategies import AGEM, EWC, GEM, SI, Naive, Replay, RouterFreezing, SparseMemory, Strategy

TAKE_ROWS: dict[str, Callable[[], Strategy]] = {
    "naive": Naive,
    "replay": partial(Replay, memory_size=6),
    "router_freezing": RouterFreezing,
    "sparse_memory": partial(SparseMemory, num_background=4, background_size=8, top_t=5, rows="uv"),
}
NEED_ALL: dict[str, Callable[[], Strategy]] = {
    "gem": partial(GEM, memory_size=6),
    "agem": partial(AGEM, memory_size=6),
    "si": SI,
}
BESIDE: dict[str, Callable[[], Strategy]] = {"ewc": partial(EWC, samples=4)}
"""Their own term of the loss gives every row a gradient, from the second experience on."""


def model() -> MLPClassifier:
    layer = partial(PEER, num_experts=400, heads=2, k=2, key_dim=8, query_norm="none")
    with seeded(0, "init"):
        return MLPClassifier((6,), 6, layer, width=16)


@pytest.mark.parametrize("name", [*TAKE_ROWS, *NEED_ALL, *BESIDE])
def test_a_strategy_learns_the_same_from_rows(name: str, new_stream, walk) -> None:
    """Plain gradient descent leaves rows without a gradient where they are, in either way."""
    new = (TAKE_ROWS | NEED_ALL | BESIDE)[name]
    ends, by_rows = [], []
    for rows in ("dense", "auto" if name in NEED_ALL else "row"):
        for at, learner in walk(model(), new_stream(), {name: new()}, rows=rows):
            if at == "trained" and rows != "dense":
                tables = [p for p in learner.model.parameters() if isinstance(p, ExpertTable)]
                by_rows.append({table.by_rows for table in tables})
        ends.append(learner.model)
    for a, b in zip(ends[0].parameters(), ends[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    assert by_rows == [{name not in NEED_ALL}] * 3


@pytest.mark.parametrize("name", NEED_ALL)
def test_rows_alone_are_refused_where_all_are_needed(name: str, new_stream) -> None:
    with pytest.raises(InputError, match=name) as caught:
        Learner(model(), SGD(lr=0.1, rows="row"), {name: NEED_ALL[name]()}, new_stream())
    assert "optimizer.rows" in caught.value.key
