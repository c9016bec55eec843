"""Router freezing: after the warm-up nothing that chooses moves, and experts go on learning."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cl_moe.errors import InputError
from cl_moe.layers.router_parts import router_names
from cl_moe.strategies import RouterFreezing, SparseMemory


@pytest.mark.parametrize("layer", ["moe", "peer"])
@pytest.mark.parametrize("warmup", [0, 1, 2])
def test_the_router_stands_still_after_its_warm_up(
    walk, new_model, new_stream, growing, layer: str, warmup: int
) -> None:
    before: dict[str, Tensor] = {}
    strategies = {"s": RouterFreezing(warmup)}
    for moment, learner in walk(new_model(layer), new_stream(), strategies, growing[layer], momentum=0.9):
        state = learner.model.state_dict()
        if moment == "adapted":
            before = {name: value.clone() for name, value in state.items()}
            continue
        chooses = set(router_names(learner.model))
        moved = {name for name, value in state.items() if not torch.equal(value, before[name])}
        assert bool(moved & chooses) == (learner.experience.index < warmup)
        assert moved - chooses, "the rest goes on learning"


def test_what_it_cannot_serve_is_refused(train, new_model, new_stream) -> None:
    with pytest.raises(InputError, match="routes nothing"):
        train(new_model("dense"), new_stream(), {"s": RouterFreezing()})
    with pytest.raises(InputError, match=r"strategy\.router_freezing\.warmup"):
        RouterFreezing(-1)
    sparse = SparseMemory(top_t=3, num_background=4, background_size=8)
    with pytest.raises(InputError, match="stops the router behind the first experience itself"):
        train(new_model("peer"), new_stream(), {"s": RouterFreezing(), "sparse_memory": sparse})


def test_beside_sparse_memories_it_stops_the_router_in_the_first_experience_too(
    walk, new_model, new_stream
) -> None:
    """Behind a warm-up of one experience both stop the same, so that pair is refused."""
    sparse = SparseMemory(top_t=3, num_background=4, background_size=8)
    strategies = {"s": RouterFreezing(0), "sparse_memory": sparse}
    states = [learner.model.state_dict() for _, learner in walk(new_model("peer"), new_stream(), strategies)]
    learnt = {name: value.clone() for name, value in states[-1].items()}
    fresh = new_model("peer")
    assert all(torch.equal(learnt[name], fresh.state_dict()[name]) for name in router_names(fresh))
