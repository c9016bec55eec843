"""Parameters that compute one token, against counts by hand."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from cl_moe.layers import PEER, PKM, DenseFFN, MoE
from cl_moe.layers.retrieval import Retrieval
from cl_moe.layers.routers import ExpertChoice, GShard, Switch, TopK
from cl_moe.models.base import active_parameters
from cl_moe.models.decoder import DecoderLM
from cl_moe.models.mlp import MLPClassifier

D, N, H = 8, 6, 10
EXPERT = 2 * D * H + H + D


def total(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("router", "chosen"),
    [(TopK(D, k=3), 3), (Switch(D), 1), (GShard(D), 2), (ExpertChoice(D, capacity_factor=1.5), 1.5)],
)
def test_experts_that_are_chosen_and_every_key(router: nn.Module, chosen: float):
    layer = MoE(D, N, H, router=router)
    assert layer.active_parameters() == N * D + chosen * EXPERT
    layer.grow(N)
    assert layer.active_parameters() == 2 * N * D + chosen * EXPERT
    layer.freeze([0])  # what is frozen computes
    assert layer.active_parameters() == 2 * N * D + chosen * EXPERT


def test_shared_experts_see_every_token():
    plain, shared = MoE(D, N, H), MoE(D, N, H, num_shared=1)
    assert shared.active_parameters() == plain.active_parameters() + EXPERT


def test_experts_of_several_sizes_count_as_their_mean():
    layer = MoE(D, N, H, router=TopK(D, k=1))
    layer.grow(N, hidden=3 * H)
    wide = 2 * D * 3 * H + 3 * H + D
    assert layer.active_parameters() == 2 * N * D + (EXPERT + wide) / 2


@pytest.mark.parametrize(("glu", "vectors"), [(False, 2), (True, 3)])
@pytest.mark.parametrize("policy", ["compete", "sum"])
def test_rows_that_are_retrieved(glu: bool, vectors: int, policy: str):
    layer = PEER(D, 16, heads=2, k=3, glu=glu, retrieval=Retrieval(policy=policy))
    tables = vectors * 16 * D
    routing = total(layer) - tables
    assert layer.active_parameters() == routing + 2 * 3 * vectors * D
    layer.grow(16)
    lists, keys = (2 if policy == "sum" else 1), 2 * 4 * (D // 2)
    assert layer.active_parameters() == routing + keys + lists * 2 * 3 * vectors * D


def test_not_more_than_there_are():
    layer = PKM(D, 4, heads=4, k=4)
    assert layer.active_parameters() == total(layer)
    dense = DenseFFN(D, H)
    assert dense.active_parameters() == total(dense)


def test_a_model_without_its_idle_experts():
    model = MLPClassifier((5,), 4, partial(MoE, num_experts=N, hidden=H), width=D, num_blocks=2)
    model.head.grow([0, 1])
    assert model.active_parameters() == total(model) - 2 * (N - 2) * EXPERT
    assert active_parameters(nn.Sequential(model, nn.Linear(3, 3))) == model.active_parameters() + 12


@pytest.mark.parametrize("capacity", [0.25, 1.0])
def test_a_block_at_depth_counts_by_its_capacity(capacity: float):
    layer = partial(MoE, num_experts=N, hidden=H)
    make = partial(DecoderLM, (6,), 11, layer, width=D, num_blocks=2, num_heads=2, slots="all")
    torch.manual_seed(0)
    plain, deep = make(), make(depth={"capacity": capacity, "every": 2})
    block = 4 * D * D + 2 * D + N * D + 2 * EXPERT  # attention, two norms, the router, two of the experts
    passing = round((1 - capacity) * block)
    assert deep.active_parameters() == plain.active_parameters() + total(deep.depths) - passing
