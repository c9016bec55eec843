"""Expert layers in a stranger's model: where they go, what is collected, and what must not change.

Legend: B batch, S positions, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cl_moe.errors import InputError
from cl_moe.layers import PEER, DenseFFN, ExpertChoice, GShard, MoE, Routing, Switch, TopK, fold_load
from cl_moe.models.foreign import collecting, put_experts

D, H = 8, 16
FEW = partial(MoE, num_experts=4, hidden=H, router=partial(TopK, k=2, balance=0.1))


class Block(nn.Module):
    def __init__(self, activation: type[nn.Module]) -> None:
        super().__init__()
        self.mix = nn.Linear(D, D)
        self.mlp = nn.Sequential(nn.Linear(D, H), activation(), nn.Linear(H, D), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(x)
        return x + self.mlp(x)


class Stranger(nn.Module):
    """A body that knows nothing of experts."""

    def __init__(self, activation: type[nn.Module] = nn.ReLU, checkpointed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(activation) for _ in range(3))
        self.out = nn.Linear(D, 5)
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return self.out(x)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 6, D, generator=torch.Generator().manual_seed(1))


def mask_of() -> Tensor:
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 3:] = False
    return mask


def test_the_layers_go_where_the_pattern_says_and_nowhere_else():
    model = Stranger()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    layers = put_experts(model, "blocks.[02].mlp", FEW)
    assert list(layers) == ["blocks.0.mlp", "blocks.2.mlp"]
    after = model.state_dict()
    for name, value in before.items():
        assert name.startswith(("blocks.0.mlp", "blocks.2.mlp")) or torch.equal(after[name], value)
    assert "blocks.2.mlp.layer.cohorts.0.w_in" in after
    assert {layer.dim for layer in layers.values()} == {D}


def test_dtype_and_mode_are_those_of_what_was_there():
    model = Stranger().double().eval()
    put_experts(model, "*.mlp", FEW)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert not any(part.training for part in model.modules())


@pytest.mark.parametrize(
    "layer", [FEW, partial(PEER, num_experts=16, heads=2, k=2), partial(MoE, router=Switch)]
)
def test_the_output_is_that_of_the_layers_by_hand(layer: Callable[..., nn.Module], x: Tensor):
    model = Stranger().eval()
    layers = put_experts(model, "blocks.*.mlp", layer)
    mask, h = mask_of(), x
    by_hand: dict[str, Routing] = {}
    for index, block in enumerate(model.blocks):
        h = h + block.mix(h)
        out, by_hand[f"blocks.{index}.mlp"] = layers[f"blocks.{index}.mlp"](h, mask=mask)
        h = h + out
    with collecting(model, mask) as seen:
        assert torch.equal(model(x), model.out(h))
    assert list(seen.routings) == list(by_hand)
    for name, routing in by_hand.items():
        (collected,) = seen.routings[name]
        assert torch.equal(fold_load(collected).score, fold_load(routing).score)
    expected: dict[str, Tensor] = {}
    for routing in by_hand.values():
        for name, loss in routing.losses.items():
            expected[name] = expected.get(name, 0) + loss
    assert seen.losses().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in seen.losses().items())


def test_cohorts_reach_every_slot(x: Tensor):
    model = Stranger().eval()
    layers = put_experts(model, "*.mlp", FEW)
    before = model(x)
    for layer in layers.values():
        layer.grow(4, init="fresh")
    assert not torch.equal(model(x), before)
    with collecting(model, cohorts=[0]):
        assert torch.equal(model(x), before)


def test_nothing_is_kept_outside_a_block_or_of_another_model(x: Tensor):
    model = Stranger()
    put_experts(model, "*.mlp", FEW)
    twin = copy.deepcopy(model)
    with collecting(model) as seen:
        twin(x)
        assert not seen.routings
    model(x)
    assert not seen.routings


def test_a_pass_belongs_to_the_innermost_block(x: Tensor):
    model = Stranger()
    put_experts(model, "*.mlp", FEW)
    with collecting(model) as outer:
        model(x)
        with collecting(model, mask_of()) as inner, torch.no_grad():
            model(x)
        model(x)
    sizes = [[len(routings) for routings in seen.routings.values()] for seen in (outer, inner)]
    assert sizes == [[2, 2, 2], [1, 1, 1]]
    assert all(r.valid is None for r in outer.routings["blocks.0.mlp"])
    assert inner.routings["blocks.0.mlp"][0].valid is not None
    assert not any(loss.requires_grad for loss in inner.losses().values())


def test_an_error_inside_closes_the_block(x: Tensor):
    model = Stranger()
    put_experts(model, "*.mlp", FEW)
    with pytest.raises(KeyError), collecting(model) as seen:
        raise KeyError
    model(x)
    assert not seen.routings


@pytest.mark.parametrize("masked", [False, True])
def test_checkpointing_changes_no_count_and_no_gradient(masked: bool, x: Tensor):
    plain, saving = Stranger(), Stranger(checkpointed=True)
    gradients, counts = [], []
    for model in (plain, saving):
        torch.manual_seed(3)
        put_experts(model, "*.mlp", FEW)
        with collecting(model, mask_of() if masked else None) as seen:
            loss = model(x).square().mean() + sum(seen.losses().values())
            loss.backward()
        counts.append([fold_load(r).count.tolist() for rs in seen.routings.values() for r in rs])
        gradients.append([p.grad for p in model.parameters()])
    assert counts[0] == counts[1]
    assert len(counts[0]) == 3
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_mask_that_is_gone_when_a_part_is_computed_again_is_named(x: Tensor):
    model = Stranger(checkpointed=True)
    put_experts(model, "*.mlp", FEW)
    with collecting(model, mask_of()):
        loss = model(x).sum()
    with pytest.raises(RuntimeError, match=r"backward\(\) inside"):
        loss.backward()


def test_a_module_in_two_places_stays_one():
    model = Stranger()
    model.blocks[2].mlp = model.blocks[0].mlp
    assert list(put_experts(model, "*.mlp", FEW)) == ["blocks.0.mlp", "blocks.1.mlp"]
    assert model.blocks[2].mlp is model.blocks[0].mlp
    with collecting(model) as seen:
        model(torch.randn(3, D))
    assert [len(routings) for routings in seen.routings.values()] == [2, 1]


def test_a_flattened_batch_takes_the_mask_flat(x: Tensor):
    model = Stranger().eval()
    put_experts(model, "*.mlp", FEW)
    with collecting(model, mask_of()) as seen:
        model(x.flatten(0, 1))
    assert torch.equal(seen.routings["blocks.0.mlp"][0].valid, mask_of().flatten())


def test_a_dense_layer_routes_nothing(x: Tensor):
    model = Stranger()
    put_experts(model, "*.mlp", partial(DenseFFN, hidden=H))
    with collecting(model) as seen:
        model(x)
    assert [routing.num_experts for routings in seen.routings.values() for routing in routings] == [0, 0, 0]
    assert seen.losses() == {}


def test_a_pattern_without_a_match_lists_the_nearest_names():
    with pytest.raises(InputError, match=r"got: pattern=block.\*.mpl.*\nallowed: .*blocks\.\*\.mlp.*\n"):
        put_experts(Stranger(), "block.*.mpl", FEW)


@pytest.mark.parametrize(
    ("pattern", "layer", "message"),
    [
        ("blocks.0*", FEW, "blocks.0 and also blocks.0.mix inside it"),
        ("out", FEW, r"lead from and to \[5, 8\]"),
        ("blocks.0.mlp.1", FEW, r"lead from and to \[\]"),
        ("blocks.0.mlp", lambda dim: nn.Linear(dim, dim), "makes a Linear"),
    ],
)
def test_what_cannot_be_put_in_is_refused_and_leaves_the_model_as_it_was(pattern, layer, message):
    model = Stranger()
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(InputError, match=message):
        put_experts(model, pattern, layer)
    assert [name for name, _ in model.named_modules()] == names


def test_the_width_can_be_given(x: Tensor):
    model = Stranger()
    model.blocks[1].mlp = nn.Identity()
    put_experts(model, "blocks.1.mlp", FEW, dim=D)
    assert model(x).shape == (2, 6, 5)


def test_collecting_from_a_model_without_experts_is_refused():
    with pytest.raises(InputError, match="no expert slots"), collecting(Stranger()):
        pass


@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU])
@pytest.mark.parametrize("k", [1, 3, 4])
def test_an_upcycled_model_computes_what_it_did(activation: type[nn.Module], k: int, x: Tensor):
    model = Stranger(activation).double().eval()
    before = model(x.double())
    router = partial(TopK, k=k)
    put_experts(
        model,
        "*.mlp",
        partial(MoE, num_experts=4, hidden=H, router=router, activation=activation.__name__.lower()),
        upcycle=True,
    )
    torch.testing.assert_close(model(x.double()), before, rtol=1e-9, atol=1e-9)
    with collecting(model, mask_of()):
        real = model(x.double())[mask_of()]
    torch.testing.assert_close(real, before[mask_of()], rtol=1e-9, atol=1e-9)
    fresh = Stranger(activation).double().eval()
    put_experts(fresh, "*.mlp", FEW)
    assert not torch.allclose(fresh(x.double()), before), "fresh experts would pass this test too"


@pytest.mark.parametrize("pattern", ["*.mlp", "blocks.1", "blocks.*.mlp.layer"])
def test_experts_that_are_there_are_not_lost_to_a_second_call(pattern: str, x: Tensor):
    model = Stranger().eval()
    put_experts(model, "blocks.[12].mlp", FEW)
    before = model(x)
    with pytest.raises(InputError, match="where experts stand already") as caught:
        put_experts(model, pattern, FEW, dim=D)
    assert caught.value.key == "pattern"
    assert torch.equal(model(x), before)
    assert list(put_experts(model, "blocks.0.mlp", FEW)) == ["blocks.0.mlp"], "free places stay free"


@pytest.mark.parametrize("router", [ExpertChoice, GShard])
def test_what_looks_ahead_is_refused_where_the_model_is_said_to_be_causal(router: type[nn.Module]):
    model, layer = Stranger(), partial(MoE, num_experts=4, router=router)
    with pytest.raises(InputError, match=f"MoE with {router.__name__}, which sees later tokens, in Stranger"):
        put_experts(model, "*.mlp", layer, causal=True)
    assert isinstance(model.blocks[0].mlp, nn.Sequential), "nothing is replaced on an error"
    put_experts(
        model, "blocks.0.mlp", partial(layer, router=partial(router, allow_noncausal=True)), causal=True
    )
    put_experts(model, "blocks.1.mlp", layer)
