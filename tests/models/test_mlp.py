"""The perceptron and its head."""

from functools import partial

import pytest
import torch
from torch import nn

from cl_moe.errors import InputError
from cl_moe.layers import Capacity, DenseFFN, ExpertChoice, GShard, MoE, Switch
from cl_moe.models import Head, MLPClassifier


def protocol_model() -> MLPClassifier:
    torch.manual_seed(0)
    model = MLPClassifier((64,), 10, DenseFFN, width=256, num_blocks=1, ffn_hidden=None)
    for first in range(0, 10, 2):
        model.head.grow([first, first + 1])
    return model


def plain(model: MLPClassifier) -> nn.Sequential:
    """64-256-256-10 with the same weights, built of torch's own parts."""
    net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    with torch.no_grad():
        for mine, theirs in ((model.stem, net[0]), (model.blocks[0].linear_in, net[2])):
            theirs.weight.copy_(mine.weight)
            theirs.bias.copy_(mine.bias)
        net[4].weight.copy_(torch.cat([rows.weight for rows in model.head.cohorts]))
        net[4].bias.copy_(torch.cat([rows.bias for rows in model.head.cohorts]))
    return net


def test_the_peers_network_has_the_plain_networks_parameters() -> None:
    model = protocol_model()
    count = sum(p.numel() for p in model.parameters())
    assert count == 64 * 256 + 256 + 256 * 256 + 256 + 256 * 10 + 10
    assert count == sum(p.numel() for p in plain(model).parameters())


def test_the_peers_network_computes_the_plain_networks_function() -> None:
    model, torch_net = protocol_model(), plain(protocol_model())
    inputs = torch.rand(32, 64)
    ours, routings = model(inputs)
    assert routings == {}
    torch.testing.assert_close(ours, torch_net(inputs), rtol=0, atol=1e-6)
    ours.sum().backward()
    torch_net(inputs).sum().backward()
    torch.testing.assert_close(model.stem.weight.grad, torch_net[0].weight.grad)


def test_inputs_of_any_shape_are_flattened(new_mlp) -> None:
    model = new_mlp("dense")
    model.head.grow([0])
    inputs = torch.randn(3, 2, 4)
    assert torch.equal(model(inputs)[0], model(inputs.flatten(1))[0])


def test_a_residual_slot_adds_its_input(new_mlp) -> None:
    plain_model, residual = new_mlp("dense"), new_mlp("dense", residual=True)
    x = torch.randn(3, 8)
    hidden = torch.relu(plain_model.stem(x))
    out = plain_model.blocks[0](hidden)[0]
    for model, expected in ((plain_model, out), (residual, hidden + out)):
        model.head.grow([0, 1])
        assert torch.equal(model(x)[0], model.head(torch.relu(expected)))


def test_an_added_block_stands_beside_the_dense_ones(new_mlp) -> None:
    """With a silent added layer, the model computes what it would without it."""
    model = new_mlp("moe", num_blocks=2, slots="added")
    model.head.grow([0, 1])
    with torch.no_grad():
        for name in ("w_out", "b_out"):
            model.blocks[1].cohorts[0].get_parameter(name).zero_()
    x = torch.randn(3, 8)
    hidden = torch.relu(model.stem(x))
    for block in (model.blocks[0], model.blocks[2]):
        hidden = torch.relu(block(hidden)[0])
    assert torch.equal(model(x)[0], model.head(hidden))


def test_a_growing_head_leaves_old_columns_as_they_are() -> None:
    """The old rows' bytes do not move; their logits, one product with the new rows', may by a rounding."""
    torch.manual_seed(0)
    head, x = Head(24), torch.randn(33, 24)
    assert head(x).shape == (33, 0)
    columns, rows = [], {}
    for classes in ([3, 1], [0], [4, 2, 5]):
        head.grow(classes)
        logits = head(x)
        assert logits.shape == (33, len(head.classes))
        for old in columns:
            torch.testing.assert_close(logits[:, : old.shape[1]], old, rtol=0, atol=1e-6)
        assert all(torch.equal(head.get_parameter(name), row) for name, row in rows.items())
        columns.append(logits)
        rows = {name: parameter.detach().clone() for name, parameter in head.named_parameters()}
    assert head.classes == [3, 1, 0, 4, 2, 5], "columns stand in order of arrival"


def test_new_rows_take_the_head_s_dtype() -> None:
    head = Head(4)
    head.grow([0])
    head.double().grow([1])
    assert {p.dtype for p in head.parameters()} == {torch.float64}


@pytest.mark.parametrize("classes", [[0], [2, 1], []])
def test_a_class_has_one_row(classes: list[int]) -> None:
    head = Head(4)
    head.grow([0, 1])
    with pytest.raises(ValueError, match="class"):
        head.grow(classes)
    assert head.classes == [0, 1]


NO_SLOTS = {
    "switch": partial(Switch, min_capacity=0, rounding="floor"),
    "gshard": partial(GShard, capacity=Capacity(2.0, 2.0, 0, "floor")),
    "expert_choice": partial(ExpertChoice, rounding="floor"),
}
SOME = {
    "switch": partial(Switch, min_capacity=1, rounding="floor"),
    "switch_up": partial(Switch, min_capacity=0),
    "gshard": partial(GShard, capacity=Capacity(2.0, 2.0, 0, "ceil")),
    "expert_choice": ExpertChoice,
    "expert_choice_all": partial(ExpertChoice, capacity_factor=4.0, rounding="floor"),
}


@pytest.mark.parametrize("name", NO_SLOTS)
def test_a_router_without_a_slot_for_a_single_token_is_refused_at_once(name: str):
    layer = partial(MoE, num_experts=4, hidden=8, router=NO_SLOTS[name])
    with pytest.raises(InputError, match=rf"router={name}.*model=mlp") as caught:
        MLPClassifier((4,), 2, layer, width=8)
    assert caught.value.key.startswith("router.rounding")
    assert "model" in caught.value.key
    with pytest.raises(InputError, match="no expert ever has a slot"):
        layer(dim=8)(torch.randn(5, 8))
    assert layer(dim=8)(torch.randn(2, 16, 8))[1].kept.any(), "sequences are served"


@pytest.mark.parametrize("name", SOME)
def test_one_with_a_slot_computes(name: str):
    model = MLPClassifier((4,), 2, partial(MoE, num_experts=4, hidden=8, router=SOME[name]), width=8)
    model.head.grow([0, 1])
    assert model(torch.randn(5, 4))[1][0].kept.view(5, -1).any(dim=1).all()


def test_slots_that_a_growth_takes_away_are_missed_at_the_next_pass():
    layer = MoE(8, 4, 8, SOME["expert_choice_all"])
    layer(torch.randn(5, 8))
    layer.grow(1)
    with pytest.raises(InputError) as caught:
        layer(torch.randn(5, 8))
    assert caught.value.key == "router.rounding (or router.capacity_factor, model)"
    layer(torch.randn(5, 8), cohorts=[0])
