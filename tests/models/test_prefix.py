"""A prefix alone equals the prefix of a longer text in a causal body; where a capacity drops, it need not."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from cl_moe.layers import PEER, PKM, DenseFFN, GShard, MoE, Scores, Switch, TopK
from cl_moe.models import DecoderLM
from cl_moe.seeds import generator, seeded

FEW = partial(MoE, num_experts=4, hidden=8)
SLOTS = ["query", "key", "value", "output"]
WITHOUT_DROPS = {
    "dense": (DenseFFN, {}),
    "top_k": (partial(FEW, router=TopK), {}),
    "loss_free": (partial(FEW, router=partial(TopK, scores=Scores("sigmoid", 1e-3))), {}),
    "peer": (partial(PEER, num_experts=16, heads=2, k=4), {}),
    "pkm": (partial(PKM, num_experts=16, heads=2, k=4), {}),
    "ample_switch": (partial(FEW, router=partial(Switch, eval_capacity_factor=4.0)), {}),
    "depth": (partial(FEW, router=TopK), {"depth": {"capacity": 0.5, "every": 1}}),
    "projections": (partial(FEW, router=TopK), {"attention_slots": SLOTS}),
}
DROPPING = {
    "switch": (partial(FEW, router=partial(Switch, eval_capacity_factor=1.0, min_capacity=0)), {}),
    "gshard": (partial(FEW, router=partial(GShard, second="none")), {}),
}


def build(layer: partial, options: dict) -> DecoderLM:
    with seeded(0):
        model = DecoderLM((32,), 11, layer, width=16, num_heads=2, num_blocks=2, slots="all", **options)
        for part in (model.tokens, model.positions, *(d.predictor[2] for d in model.depths.values())):
            nn.init.normal_(part.weight)  # far enough apart that tokens are routed apart
    return model.eval()


def tokens() -> Tensor:
    return torch.randint(11, (4, 32), generator=generator(1))


@torch.no_grad()
@pytest.mark.parametrize("name", WITHOUT_DROPS)
def test_a_prefix_alone_is_the_prefix_of_a_longer_text(name: str) -> None:
    model, inputs = build(*WITHOUT_DROPS[name]), tokens()
    whole, routings = model(inputs)
    for length in (1, 7, 16, 31):
        alone, _ = model(inputs[:, :length])
        torch.testing.assert_close(alone, whole[:, :length], rtol=1e-4, atol=1e-5)
    if name == "depth":
        assert any(0 < r.kept.float().mean() < 1 for r in routings.values() if r.num_experts == 1)


@torch.no_grad()
@pytest.mark.parametrize("name", WITHOUT_DROPS | DROPPING)
def test_what_comes_later_does_not_reach_the_past(name: str) -> None:
    """Texts of one length: a capacity is then the same."""
    model, inputs = build(*(WITHOUT_DROPS | DROPPING)[name]), tokens()
    before, _ = model(inputs)
    for position in (1, 9, 31):
        changed = inputs.clone()
        changed[:, position:] = (changed[:, position:] + 3) % 11
        after, _ = model(changed)
        torch.testing.assert_close(after[:, :position], before[:, :position], rtol=1e-4, atol=1e-5)
        assert (after[:, position] - before[:, position]).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("name", DROPPING)
def test_a_capacity_counts_the_whole_text_so_a_prefix_alone_drops_others(name: str) -> None:
    """The exception that ``Router.causal`` states: twice the tokens, twice the slots."""
    layer = DROPPING[name][0](dim=16).eval()
    nn.init.zeros_(layer.cohorts[0].key)
    nn.init.constant_(layer.cohorts[0].key[0], 1.0)  # all want expert 0
    x = torch.rand(1, 32, 16)
    slots = [int(layer.router.capacity.slots(torch.tensor([n]), 4, training=False)) for n in (32, 16)]
    assert slots[0] > slots[1]
    first = [layer(part)[1].kept[:, 0] for part in (x, x[:, :16])]
    for kept, count in zip(first, slots, strict=True):
        assert torch.equal(kept, torch.arange(len(kept)) < count), "in the order of the text"
    assert not torch.equal(first[0][:16], first[1])
