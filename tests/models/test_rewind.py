"""The model with its router as it was: the bits of then where nothing else moved, and no trace afterwards."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from cl_moe.growth.adapt import apply
from cl_moe.layers import router_names
from cl_moe.models import MLPClassifier
from cl_moe.models.rewind import RouterState

LAYERS = ("moe", "switch", "peer", "pkm", "dense")


def grown_since(model: MLPClassifier, layer: str) -> None:
    """Two more classes, a cohort more, and another router."""
    apply(model, {"act": "head", "classes": [2, 3]}, {})
    if layer != "dense":
        size = 4 if layer in ("moe", "switch") else 16
        apply(model, {"act": "grow", "layer": 0, "num_experts": size, "init": "fresh", "noise": 0.0}, {})
    with torch.no_grad():
        for name in router_names(model):
            model.state_dict()[name].add_(1.0)


@pytest.fixture
def begun(new_mlp: Callable[..., MLPClassifier]) -> Callable[[str], MLPClassifier]:
    def build(layer: str) -> MLPClassifier:
        model = new_mlp(layer).eval()
        apply(model, {"act": "head", "classes": [0, 1]}, {})
        return model

    return build


@pytest.mark.parametrize("layer", LAYERS)
def test_with_weights_that_stood_still_it_answers_as_then(layer: str, begun: Callable):
    model, x = begun(layer), torch.randn(9, 2, 4)
    then, before = RouterState.of(model), model(x)[0]
    grown_since(model, layer)
    assert torch.equal(then.logits(model, x), before)
    assert not then.is_of(model)


@pytest.mark.parametrize("layer", LAYERS)
def test_the_model_is_as_it_was_afterwards(layer: str, begun: Callable):
    model, x = begun(layer), torch.randn(9, 2, 4)
    then = RouterState.of(model)
    grown_since(model, layer)
    held = {name: (value, value.clone()) for name, value in model.named_parameters()}
    held |= {name: (value, value.clone()) for name, value in model.named_buffers()}
    now, _ = model(x)
    for broken in (False, True):
        if broken:
            hook = model.head.register_forward_pre_hook(_interrupt)
            with pytest.raises(KeyboardInterrupt):
                then.logits(model, x)
            hook.remove()
        else:
            then.logits(model, x)
        live = dict(model.named_parameters()) | dict(model.named_buffers())
        assert live.keys() == held.keys()
        assert all(
            live[name] is tensor and torch.equal(tensor, copy) for name, (tensor, copy) in held.items()
        )
        assert model.head.classes == [0, 1, 2, 3]
        assert torch.equal(model(x)[0], now)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_weights_of_now_answer_with_the_router_of_then(begun: Callable):
    """Against a second model whose router was put back by hand."""
    model, other, x = begun("moe"), begun("moe"), torch.randn(9, 2, 4)
    then = RouterState.of(model)
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            mine.copy_(torch.randn_like(mine))
            theirs.copy_(mine)
        for name, value in then.values.items():
            other.state_dict()[name].copy_(value)
    assert torch.equal(then.logits(model, x), other(x)[0])
    assert not torch.equal(then.logits(model, x), model(x)[0])


@pytest.mark.parametrize("layer", LAYERS)
def test_it_holds_the_router_only_and_what_stood_still_once(layer: str, begun: Callable):
    model = begun(layer)
    first = RouterState.of(model)
    assert set(first.values) == set(router_names(model))
    second = RouterState.of(model, first)
    assert all(second.values[name] is value for name, value in first.values.items())
    assert first.is_of(model)
    grown_since(model, layer)
    third = RouterState.of(model, second)
    assert not any(third.values[name] is value for name, value in second.values.items())
    assert (second.num_cohorts, third.num_cohorts) == ((0, 0) if layer == "dense" else (1, 2))
    assert (second.num_head_cohorts, third.num_head_cohorts) == (1, 2)


def test_it_goes_through_a_file(begun: Callable, tmp_path):
    model = begun("peer")
    first = RouterState.of(model)
    states = [first, RouterState.of(model, first)]
    torch.save([state.state_dict() for state in states], tmp_path / "two.pt")
    torch.save([first.state_dict()], tmp_path / "one.pt")
    read = [RouterState(**state) for state in torch.load(tmp_path / "two.pt", weights_only=True)]
    assert all(torch.equal(read[0].values[name], value) for name, value in first.values.items())
    assert all(read[1].values[name] is value for name, value in read[0].values.items())
    sizes = [(tmp_path / name).stat().st_size for name in ("one.pt", "two.pt")]
    assert sizes[1] < 1.5 * sizes[0]


@pytest.mark.parametrize("layer", ["dense", "moe", "peer"])
def test_a_language_model(layer: str, new_decoder: Callable):
    model = new_decoder(layer, depth={"capacity": 0.5, "every": 1}).eval()
    tokens, mask = torch.randint(11, (4, 12)), torch.ones(4, 12, dtype=torch.bool)
    mask[1, 5:] = False
    then, before = RouterState.of(model), model(tokens, mask=mask)[0]
    with torch.no_grad():
        for name in router_names(model):
            model.state_dict()[name].add_(torch.rand_like(model.state_dict()[name]))  # a variance stays one
    assert not torch.equal(model(tokens, mask=mask)[0], before)
    assert torch.equal(then.logits(model, tokens, mask), before)


@pytest.mark.parametrize("layer", ["moe", "peer"])
def test_what_was_pruned_since_is_a_candidate_and_what_was_pruned_before_is_none(layer, begun: Callable):
    model, x = begun(layer), torch.randn(9, 2, 4)
    (body, *_) = model.expert_layers.values()
    born = 16 if layer == "peer" else 2
    for part in model.expert_layers.values():
        part.grow(born)
    first, before = RouterState.of(model), model(x)[0]
    body.prune([0])
    second, between = RouterState.of(model), model(x)[0]
    assert not torch.equal(before, between)
    assert not first.is_of(model)
    for part in model.expert_layers.values():
        part.grow(born)
    now = model(x)[0]
    for then, expected in ((first, before), (second, between)):
        torch.testing.assert_close(then.logits(model, x), expected)
    assert torch.equal(model(x)[0], now)
    assert body.pruned_cohorts == (0,)
