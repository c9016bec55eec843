"""A mixture that goes on from a dense model: what is copied, what stays frozen, what is refused."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from cl_moe.errors import InputError
from cl_moe.growth.adapt import add_classes, apply, replay
from cl_moe.layers import DenseFFN, ExpertChoice, GShard, MoE, Switch, TopK
from cl_moe.models import ContinualModel, DecoderLM, EncoderClassifier, MLPClassifier, PatchTransformer
from cl_moe.upcycling import Upcycled

DENSE = partial(DenseFFN, hidden=6)
MIXTURE = partial(MoE, hidden=6, num_experts=3)
BODIES = {
    "mlp": partial(MLPClassifier, (8,), 4, width=8, num_blocks=3, ffn_hidden=5, slots="every_other"),
    "added": partial(MLPClassifier, (8,), 4, width=8, num_blocks=2, slots="added"),
    "decoder": partial(DecoderLM, (8,), 16, width=8, num_blocks=2, num_heads=2, ffn_hidden=5, slots="all"),
    "depth": partial(DecoderLM, (8,), 16, width=8, num_blocks=2, num_heads=2, depth=0.5),
    "patches": partial(PatchTransformer, (1, 4, 4), 4, width=8, num_blocks=2, num_heads=2),
    "text": partial(EncoderClassifier, (8,), 4, width=8, num_blocks=2, num_heads=2),
}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def inputs(body: str) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    if body in ("mlp", "added"):
        return torch.randn(5, 8, generator=draw, dtype=torch.float64)
    if body == "patches":
        return torch.randn(5, 1, 4, 4, generator=draw, dtype=torch.float64)
    return torch.randint(16, (5, 8), generator=draw)


def started(model: ContinualModel, ledger: list) -> ContinualModel:
    replay(model, ledger)
    return model


def pair(body: str, layer: partial = MIXTURE, **options: float) -> tuple[ContinualModel, ContinualModel]:
    """A dense model with a head, and the mixture that goes on from it; both in float64, evaluating."""
    dense = BODIES[body](layer=DENSE)
    ledger = add_classes(dense, [[0, 1], [2, 3]], 0) if dense.kind == "classification" else []
    fresh = BODIES[body](layer=layer)
    taken = Upcycled.of(fresh, dense, ledger, 2, **options)
    assert len(fresh.head.classes) in (0, 16), "the fresh model is left as it was"
    assert taken.ledger[: len(ledger)] == ledger
    mixture = started(BODIES[body](layer=layer), taken.ledger)
    mixture.load_state_dict(taken.weights)
    assert [event["exact"] for event in taken.ledger[len(ledger) :]] == [taken.exact] * len(
        mixture.expert_layers
    )
    return dense.double().eval(), mixture.double().eval()


@pytest.mark.parametrize("body", BODIES)
@torch.no_grad()
def test_it_computes_what_the_dense_model_did(body: str):
    dense, mixture = pair(body)
    (old, _), (new, routings) = dense(inputs(body)), mixture(inputs(body))
    assert torch.allclose(old, new, rtol=1e-5, atol=1e-6)
    assert {*mixture.expert_layers} <= {*routings}
    first = next(iter(mixture.expert_layers.values()))
    first.cohorts[0].w_out.mul_(-5)  # and it can fail
    assert not torch.allclose(old, mixture(inputs(body))[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("layer", "exact", "same"),
    [
        (partial(MIXTURE, router=partial(TopK, k=1)), True, True),
        (partial(MIXTURE, router=partial(TopK, k=3)), True, True),
        (partial(MIXTURE, router=partial(TopK, normalize="all")), False, False),
        (partial(MIXTURE, router=Switch), False, False),
        (partial(MIXTURE, router=GShard), False, None),  # it depends on who else is in the sequence
        (partial(MIXTURE, router=ExpertChoice), False, None),
        (partial(MIXTURE, num_shared=1), False, False),
    ],
)
@torch.no_grad()
def test_the_ledger_says_whether_it_does(layer: partial, exact: bool, same: bool | None):
    dense = started(BODIES["mlp"](layer=DENSE), ledger := [{"experience": 0, "act": "head", "classes": [0]}])
    taken = Upcycled.of(BODIES["mlp"](layer=layer), dense, ledger, 1)
    mixture = started(BODIES["mlp"](layer=layer), taken.ledger)
    mixture.load_state_dict(taken.weights)
    mixture.get_submodule("blocks.1").register_forward_hook(lambda part, given, out: outs.append(out[0]))
    dense.get_submodule("blocks.1").register_forward_hook(lambda part, given, out: outs.append(out[0]))
    outs: list[torch.Tensor] = []
    for model in (dense, mixture):
        model.eval()(inputs("mlp").float())
    assert taken.exact == exact
    assert same is None or torch.allclose(*outs, atol=1e-5) == same


def test_noise_comes_from_the_seed_alone():
    torch.manual_seed(5)
    dense, fresh = BODIES["mlp"](layer=DENSE), BODIES["mlp"](layer=MIXTURE)
    state = torch.get_rng_state()
    one, same, other = (Upcycled.of(fresh, dense, [], 1, noise=0.1, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    name = "blocks.1.cohorts.0.w_in"
    assert torch.equal(one.weights[name], same.weights[name])
    assert not torch.equal(one.weights[name], other.weights[name])
    assert not one.exact
    dense_w = dense.get_parameter("blocks.1.linear_in.weight").detach().t()
    assert (one.weights[name] - dense_w).std() == pytest.approx(0.1 * dense_w.std().item(), rel=0.3)


def test_copies_of_what_was_frozen_are_frozen_and_newborns_learn():
    ledger = [{"experience": 0, "act": "head", "classes": [0]}, {"experience": 1, "act": "freeze_all"}]
    dense = started(BODIES["mlp"](layer=DENSE), ledger)
    taken = Upcycled.of(BODIES["mlp"](layer=MIXTURE), dense, ledger, 2)
    mixture = started(BODIES["mlp"](layer=MIXTURE), taken.ledger)
    assert not any(parameter.requires_grad for parameter in mixture.parameters())
    grow = {"experience": 2, "act": "grow", "layer": 1, "num_experts": 2, "init": "copy", "noise": 0.0}
    apply(mixture, grow, {})
    learning = [name for name, parameter in mixture.named_parameters() if parameter.requires_grad]
    assert learning
    assert all(name.startswith("blocks.1.cohorts.1.") for name in learning)


def test_projections_have_no_feed_forward_layer_to_be_copies_of():
    body = partial(DecoderLM, (8,), 16, width=8, num_blocks=2, num_heads=2, attention_slots="value")
    with pytest.raises(InputError, match="attention"):
        Upcycled.of(body(layer=MIXTURE), body(layer=DENSE), [], 1)


def test_models_that_differ_elsewhere_are_refused():
    dense = MLPClassifier((8,), 4, layer=DENSE, width=8, num_blocks=1)
    deeper = MLPClassifier((8,), 4, layer=MIXTURE, width=8, num_blocks=2, ffn_hidden=6, slots="middle")
    with pytest.raises(InputError, match="expert layers only"):
        Upcycled.of(deeper, dense, [], 1)
    with pytest.raises(InputError, match="of a run with experts"):
        Upcycled.of(deeper, deeper, [], 1)
    with pytest.raises(InputError, match="into a dense layer"):
        Upcycled.of(dense, dense, [], 1)


def test_state_that_speaks_of_old_parameters_is_dropped():
    dense, fresh = BODIES["mlp"](layer=DENSE), BODIES["mlp"](layer=MIXTURE)
    taken = Upcycled.of(fresh, dense, [], 1)
    of_strategies = {
        "memory": {"inputs": torch.ones(2), "seen": 3, "note": ["stem"]},
        "old values": {"values": {"stem.weight": torch.ones(2)}},
        "importance": {"parts": [{"name": "model.blocks.1.linear_in.weight", "value": 1.0}]},
        "empty": {},
    }
    moments = {f"model.{name}": {"step": 1} for name in dense.state_dict()}
    learner = {"model": dense.state_dict(), "ledger": [], "optimizer": moments, "strategies": of_strategies}
    state = taken.take_over({"learner": learner, "boundary": 1})
    assert state["boundary"] == 1
    assert {*state["learner"]["strategies"]} == {"memory", "empty"}
    kept = {*state["learner"]["optimizer"]}
    assert "model.stem.weight" in kept
    assert "model.blocks.0.linear_in.weight" in kept, "a block that keeps its dense layer"
    assert not [name for name in kept if name.startswith("model.blocks.1.")]
    assert len(learner["strategies"]) == 4, "the parent's own is left as it was"


@torch.no_grad()
def test_a_foreign_body_goes_on_as_a_mixture():
    pytest.importorskip("transformers", reason="the extra `transformers` is not installed")
    from cl_moe.models import HuggingFaceLM

    config = {"hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 2, "num_attention_heads": 2}
    body = partial(HuggingFaceLM, (8,), 16, model_type="gpt_neox", config=config)
    dense = body(layer=DENSE)
    layer = partial(MIXTURE, activation="gelu")
    taken = Upcycled.of(body(layer=layer), dense, [], 1)
    mixture: nn.Module = body(layer=layer)
    mixture.load_state_dict(taken.weights)
    old, new = (model.eval()(inputs("decoder"))[0] for model in (dense, mixture))
    assert taken.exact
    assert torch.allclose(old, new, atol=1e-5)
