"""Attention, its projections made of experts, blocks at depth, and who may look ahead."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from cl_moe.errors import InputError
from cl_moe.growth import EveryExperience, PastExperts
from cl_moe.growth.adapt import adapt, replay, take_census
from cl_moe.layers import PEER, DenseFFN, MoE, Switch, TopK
from cl_moe.layers.routers import ExpertChoice
from cl_moe.models import DecoderClassifier, DecoderLM, EncoderClassifier, EncoderLM, PatchTransformer
from cl_moe.models.attention import Attention
from cl_moe.models.base import depth_key
from cl_moe.seeds import seeded

MOE = partial(MoE, num_experts=4, hidden=8, router=partial(TopK, k=2))
TEXT = {"width": 16, "num_heads": 2, "num_blocks": 2, "slots": "all", "ffn_hidden": 8}
BODIES = {
    "decoder": partial(DecoderLM, (12,), 11),
    "encoder": partial(EncoderLM, (12,), 11),
    "encoder_classifier": partial(EncoderClassifier, (12,), 3, vocabulary=11),
    "decoder_classifier": partial(DecoderClassifier, (12,), 3, vocabulary=11),
    "patch_transformer": partial(PatchTransformer, (36,), 3),
}


def build(body: str, layer=MOE, **options: object):
    with seeded(0, "init"):
        model = BODIES[body](layer, **(TEXT | options))
        if not model.head.classes:
            model.head.grow([0, 1, 2])
        for part in model.modules():
            if isinstance(part, nn.Embedding):  # far enough apart that tokens are routed apart
                nn.init.normal_(part.weight)
        return model


def inputs_of(body: str, rows: int = 3) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    if body == "patch_transformer":
        return torch.rand(rows, 36, generator=draw)
    return torch.randint(1, 11, (rows, 12), generator=draw)


def attention_by_hand(layer: Attention, x_BSD: Tensor, mask: Tensor) -> Tensor:
    """Row by row, head by head, query by query."""
    width = x_BSD.shape[-1]
    size = width // layer.num_heads
    q, k, v = (x_BSD @ w.T for w in layer.qkv.weight.split(width))
    out = torch.zeros_like(x_BSD)
    for b in range(len(x_BSD)):
        for head in range(layer.num_heads):
            part = slice(head * size, (head + 1) * size)
            for s in range(x_BSD.shape[1]):
                seen = [t for t in range(x_BSD.shape[1]) if mask[b, t] and not (layer.causal and t > s)]
                if seen:
                    scores = torch.stack([q[b, s, part] @ k[b, t, part] / size**0.5 for t in seen])
                    out[b, s, part] = scores.softmax(dim=0) @ v[b, seen, part]
    return out @ layer.out.weight.T


@pytest.mark.parametrize("causal", [True, False])
def test_attention_equals_a_loop(causal: bool) -> None:
    torch.manual_seed(0)
    layer, x = Attention(8, 2, causal).double(), torch.randn(3, 5, 8, dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor([[5], [3], [0]])
    out, routings = layer(x, mask)
    assert routings == {}
    assert out.isfinite().all()
    torch.testing.assert_close(out[mask], attention_by_hand(layer, x, mask)[mask])


@pytest.mark.parametrize("body", BODIES)
def test_projections_of_experts_equal_linear_ones_of_the_same_map(body: str) -> None:
    """One expert with gate 1 that computes W x is the projection W."""
    width = 16
    names = ["query", "key", "value", "output"]
    one = partial(MoE, num_experts=1, hidden=2 * width, router=partial(TopK, k=1, balance=0.0), bias=False)
    plain, experts = build(body, one).double(), build(body, one, attention_slots=names).double()
    state = {name: value for name, value in plain.state_dict().items() if "attention" not in name}
    assert not experts.load_state_dict(state, strict=False).unexpected_keys
    eye = torch.eye(width, dtype=torch.float64)
    with torch.no_grad():
        for simple, mixer in zip(plain.mixers, experts.mixers, strict=True):
            maps = [*simple.attention.qkv.weight.split(width), simple.attention.out.weight]
            for name, weight in zip(names, maps, strict=True):
                cohort = mixer.attention.experts[name].cohorts[0]
                cohort.w_in.copy_(torch.cat([eye, -eye], dim=1).unsqueeze(0))  # relu(x) - relu(-x) = x
                cohort.w_out.copy_(torch.cat([weight.T, -weight.T]).unsqueeze(0))
    inputs = inputs_of(body)
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    torch.testing.assert_close(experts(inputs)[0], plain(inputs)[0], rtol=0, atol=1e-10)


def test_projections_have_indices_of_their_own_and_grow_and_freeze() -> None:
    def made():
        return build("decoder", attention_slots=["output", "query"])

    model, ledger = made(), []
    assert list(model.expert_layers) == [0, 1, 2, 3, 8, 9], "blocks, their queries, (keys, values), outputs"
    assert model.expert_layers[3] is model.mixers[1].attention.experts["query"]
    assert model.expert_layers[8] is model.mixers[0].attention.experts["output"]
    assert sorted(model(inputs_of("decoder"))[1]) == [0, 1, 2, 3, 8, 9]
    for index in range(2):
        census = take_census(model, index, ledger, {})
        ledger += adapt(model, census, EveryExperience(2, init="fresh"), PastExperts(), (), 0)
    assert all(layer.cohort_sizes == (4, 2) for layer in model.expert_layers.values())
    assert all(layer.frozen_cohorts == (True, False) for layer in model.expert_layers.values())
    again = made()
    replay(again, ledger)
    again.load_state_dict(model.state_dict())
    inputs = inputs_of("decoder")
    assert torch.equal(model(inputs)[0], again(inputs)[0])
    assert not torch.equal(model(inputs, cohorts=[0])[0], model(inputs)[0])


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("training", [True, False])
def test_depth_is_reported_beside_the_experts(body: str, training: bool) -> None:
    model = build(body, depth={"capacity": 0.5, "every": 2}).train(training)
    inputs = inputs_of(body)
    _, routings = model(inputs)
    assert sorted(routings) == [depth_key(1), 0, 1]
    assert list(model.expert_layers) == [0, 1]
    went = routings[depth_key(1)].kept.view(-1)
    tokens = 3 * (9 if body == "patch_transformer" else 12)
    assert len(went) == routings[0].num_tokens == routings[1].num_tokens == tokens
    assert torch.equal(routings[1].pairs()[0].unique(), went.nonzero().squeeze(1))
    if training or not model.causal:
        assert went.view(3, -1).sum(dim=1).eq(-(-tokens // 3 // 2)).all()
    assert ("depth_predictor" in routings[depth_key(1)].losses) == (training and model.causal)


@pytest.mark.parametrize("body", BODIES)
def test_at_full_depth_with_r_1_it_is_the_plain_model(body: str) -> None:
    plain, deep = build(body), build(body, depth={"capacity": 1.0, "every": 1})
    assert not deep.load_state_dict(plain.state_dict(), strict=False).unexpected_keys
    for router in deep.depths.values():
        router.score = Ones(router.score.weight)
    inputs = inputs_of(body)
    torch.testing.assert_close(deep(inputs)[0], plain(inputs)[0], rtol=1e-4, atol=1e-5)


class Ones(nn.Module):
    """Weights from which every token gets r = 1, whatever it is."""

    class Weight(Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            if func is torch.nn.functional.linear:
                return torch.ones_like(args[0][..., :1])
            return super().__torch_function__(func, types, args, kwargs or {})

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight.detach().as_subclass(self.Weight)


@pytest.mark.parametrize("layer", ["moe", "switch", "peer", "dense"])
@pytest.mark.parametrize("capacity", [0.25, 0.5])
def test_in_evaluation_the_future_does_not_reach_the_past(layer: str, capacity: float) -> None:
    layers = {
        "moe": MOE,
        "switch": partial(MoE, num_experts=4, hidden=8, router=Switch),
        "peer": partial(PEER, num_experts=16, heads=2, k=4, key_dim=8),
        "dense": DenseFFN,
    }
    model = build("decoder", layers[layer], depth={"capacity": capacity, "every": 1}).eval()
    with torch.no_grad():  # so that about half of the tokens go through
        for router in model.depths.values():
            router.predictor[2].bias -= router.predictor(model.tokens.weight).median()
    inputs = inputs_of("decoder", rows=4)
    for position in (1, 6, 11):
        changed = inputs.clone()
        changed[:, position:] = (changed[:, position:] + 3) % 11
        with torch.no_grad():
            (before, one), (after, other) = model(inputs), model(changed)
        torch.testing.assert_close(before[:, :position], after[:, :position], rtol=0, atol=1e-5)
        for block in (0, 1):
            kept = [routings[depth_key(block)].kept.view(4, 12)[:, :position] for routings in (one, other)]
            assert torch.equal(*kept)
    went = one[depth_key(0)].kept
    assert 0 < went.sum() < went.numel()


@pytest.mark.parametrize("slots", [{}, {"slots": "middle", "attention_slots": "query"}])
@pytest.mark.parametrize("body", BODIES)
def test_a_layer_that_looks_ahead_is_refused_where_the_model_may_not(body: str, slots: dict) -> None:
    layer = partial(MoE, num_experts=4, hidden=8, router=ExpertChoice)
    if body not in ("decoder", "decoder_classifier"):
        assert build(body, layer, **slots)(inputs_of(body))[0].isfinite().all()
        return
    with pytest.raises(InputError, match=r"ExpertChoice.*Decoder") as caught:
        build(body, layer, **slots)
    assert caught.value.key == "router (or model)"


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"attention_slots": "queries"}, "model.attention_slots"),
        ({"attention_slots": ["query", "query"]}, "model.attention_slots"),
        ({"attention_slots": ["none", "query"]}, "model.attention_slots"),
        ({"attention_slots": "query", "slots": "added"}, "model.attention_slots (or model.slots)"),
        ({"depth": {"every": 3}}, "model.depth.every"),
        ({"depth": {"every": 0}}, "model.depth.every"),
        ({"depth": {"share": 0.5}}, "model.depth.share"),
        ({"depth": 2.0}, "model.depth.capacity"),
        ({"num_heads": 0}, "model.num_heads"),
    ],
)
def test_what_cannot_be_built_is_refused(options: dict[str, object], key: str) -> None:
    with pytest.raises(InputError) as caught:
        build("encoder", **options)
    assert caught.value.key == key


def test_every_block_may_be_at_depth_also_an_added_one() -> None:
    model = build("decoder", slots="added", depth={"capacity": 0.5, "every": 1})
    routings: Sequence[int] = sorted(model(inputs_of("decoder"))[1])
    assert routings == [-3, -2, -1, 1]
