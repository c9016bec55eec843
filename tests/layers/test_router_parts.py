"""What a layer calls its router's is all that choices depend on, and nothing of what experts compute."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cl_moe.layers import (
    PEER,
    PKM,
    DenseFFN,
    ExpertChoice,
    GShard,
    MixtureOfDepths,
    MoE,
    Retrieval,
    Scores,
    Switch,
    TopK,
    router_names,
)

OWN = Retrieval(queries="per_cohort")
BUILD = {
    "top_k": lambda: MoE(8, 4, 8, TopK),
    "shared experts": lambda: MoE(8, 4, 8, TopK, num_shared=2),
    "loss-free": lambda: MoE(8, 4, 8, lambda dim: TopK(dim, scores=Scores("sigmoid", bias_rate=1e-3))),
    "switch": lambda: MoE(8, 4, 8, Switch),
    "gshard": lambda: MoE(8, 4, 8, GShard),
    "expert_choice": lambda: MoE(8, 4, 8, ExpertChoice),
    "peer": lambda: PEER(8, 16, heads=2, k=2),
    "peer, own queries": lambda: PEER(8, 16, heads=2, k=2, query_norm="layer", retrieval=OWN),
    "pkm": lambda: PKM(8, 16, heads=2, k=2),
}


def grown(name: str) -> nn.Module:
    torch.manual_seed(0)
    layer = BUILD[name]()
    layer.grow(16 if "p" in name.split()[0] and "top" not in name else 4)
    return layer.eval()


def redraw(layer: nn.Module, names: set[str]) -> None:
    with torch.no_grad():
        for name, value in layer.state_dict().items():
            if name in names:
                value.add_(torch.rand_like(value) * 3)


@pytest.mark.parametrize("name", BUILD)
def test_choices_depend_on_the_routers_parts_only(name: str):
    layer, x = grown(name), torch.randn(3, 7, 8)
    chooses = set(router_names(layer))
    assert chooses < set(layer.state_dict())
    out, before = layer(x)
    redraw(layer, set(layer.state_dict()) - chooses)
    changed, after = layer(x)
    for one, other in zip(before.pairs(), after.pairs(), strict=True):
        assert torch.equal(one, other)
    assert not torch.allclose(out, changed)
    redraw(layer, chooses)
    assert not torch.equal(layer(x)[1].weight, after.weight)


@pytest.mark.parametrize("name", BUILD)
def test_every_part_of_a_router_has_a_say(name: str):
    """Each named parameter or buffer, moved alone, moves a weight or a choice."""
    x = torch.randn(4, 9, 8)
    for part in router_names(grown(name)):
        layer = grown(name)
        if part.endswith("selection_bias"):
            layer.state_dict()[part][0] = 100.0
        else:
            redraw(layer, {part})
        before, after = grown(name)(x)[1], layer(x)[1]
        same = torch.equal(before.expert, after.expert) and torch.equal(before.weight, after.weight)
        assert not same, part


def test_a_block_at_depth_has_a_router_and_a_dense_layer_has_none():
    depth = MixtureOfDepths(MoE(8, 4, 8), 8)
    names = router_names(nn.ModuleDict({"deep": depth, "flat": DenseFFN(8)}))
    assert "deep.depth.score.weight" in names
    assert "deep.depth.predictor.0.weight" in names
    assert "deep.block.cohorts.0.key" in names
    assert not [name for name in names if "flat" in name or "w_in" in name]


def test_what_freezes_with_a_shared_router_is_the_routers():
    """``shared_router``, which policies freeze, and ``router_parts``, which are rolled back, agree."""
    for name in BUILD:
        layer = grown(name)
        shared = {id(p) for module in layer.shared_router for p in module.parameters()}
        named = {
            id(layer.get_parameter(n)) for n in router_names(layer) if n in dict(layer.named_parameters())
        }
        assert shared <= named
