"""Gradients that stand in the same memory step by step, and never in memory that somebody still looks at."""

import copy
import pickle

import pytest
import torch

from cl_moe.layers import PEER, MoE, grouped
from cl_moe.layers.reuse import Reused


def test_memory_is_used_again_when_nobody_holds_the_last_tensor():
    memory, like = Reused(), torch.zeros(1, dtype=torch.float64)
    first = memory.empty((10, 3), like)
    place, view = first.data_ptr(), first[2:]
    assert first.dtype == like.dtype
    del first
    second = memory.empty((10, 3), like)
    assert second.data_ptr() != place  # the view is still there
    place = second.data_ptr()
    del second
    assert memory.empty((11, 2), like).data_ptr() == place != view.data_ptr()
    rows = torch.sparse_coo_tensor(
        torch.arange(11)[None], memory.empty((11, 2), like), (20, 2), check_invariants=True
    )
    assert memory.empty((5, 2), like).data_ptr() != rows._values().data_ptr() == place
    assert memory.empty((0, 3), like).numel() == 0
    for other in (copy.deepcopy(memory), pickle.loads(pickle.dumps(memory))):
        assert other.empty((3, 3), like).shape == (3, 3)


@pytest.mark.parametrize("kind", ["peer", "moe"])
def test_a_gradient_that_is_kept_does_not_change_and_the_next_step_computes_the_same(kind, monkeypatch):
    monkeypatch.setattr(grouped, "_LARGE", 0)  # the matrices' gradients are put together from pieces too
    monkeypatch.setattr(grouped, "_PART", 3 * 8 * 6 * 4)
    torch.manual_seed(0)
    layer = PEER(8, 400, heads=3, k=4, key_dim=4, query_norm="none") if kind == "peer" else MoE(8, 5, 6)
    plain = copy.deepcopy(layer)
    name = "cohorts.0.v" if kind == "peer" else "cohorts.0.w_out"
    weight, other, kept = layer.get_parameter(name), plain.get_parameter(name), []
    if kind == "peer":
        weight.by_rows = True
    else:
        monkeypatch.setattr(plain.cohorts[0], "_memory", dict.fromkeys(("w_in", "w_up", "w_out")))
    for step in range(4):
        x = torch.randn(6, 8)
        for one in (layer, plain):
            one.zero_grad()
            one(x)[0].square().sum().backward()
        assert torch.equal(weight.grad.to_dense(), other.grad)
        if step < 2:
            kept.append((weight.grad, weight.grad.to_dense().clone()))
    for gradient, value in kept:
        assert torch.equal(gradient.to_dense(), value)
    layer.freeze([0])
    memory = weight.memory if kind == "peer" else layer.cohorts[0]._memory["w_out"]
    assert memory._block is None
