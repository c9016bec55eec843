"""Shared experts, dropout inside experts, cohorts of different hidden width, and bad input."""

import pytest
import torch

from cl_moe.errors import InputError, RunFailedError
from cl_moe.layers import PEER, DenseFFN, ExpertChoice, MoE, TopK, fold_load


def test_shared_experts_are_experts_that_everyone_passes():
    torch.manual_seed(0)
    layer = MoE(8, 4, 6, num_shared=2, activation="gelu").double()
    x = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(3, 5) > 0.3
    out, routing = layer(x, mask)
    s = layer.shared
    expected = layer.cohorts(x.reshape(-1, 8), routing).reshape(x.shape)
    for e in range(2):  # one after the other, each with its slice of the wide layer
        own = slice(6 * e, 6 * e + 6)
        hidden = torch.nn.functional.gelu(x @ s.w_in[:, own] + s.b_in[own])
        expected = expected + (hidden @ s.w_out[own] + s.b_out[e]) * mask[..., None]
    torch.testing.assert_close(out, expected)
    ours = torch.autograd.grad(out.square().sum(), [x, *s.parameters()], retain_graph=True)
    theirs = torch.autograd.grad(expected.square().sum(), [x, *s.parameters()])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_shared_experts_are_trunk_and_of_every_cohorts_age():
    layer = MoE(8, 4, 6, num_shared=1)
    before = layer(torch.ones(2, 8))[0]
    layer.grow(4, "zero_output")
    layer.freeze(shared=True)
    assert layer.frozen_cohorts == (True, True)
    assert all(p.requires_grad for p in layer.shared.parameters())
    assert torch.equal(layer(torch.ones(2, 8), cohorts=[0])[0], before)
    alone = layer(torch.ones(2, 8), cohorts=[1])[0]
    torch.testing.assert_close(alone, layer.shared(torch.ones(2, 8)))
    assert fold_load(layer(torch.ones(2, 8))[1]).count.shape == (8,)


def test_without_shared_experts_nothing_is_drawn_or_stored_for_them():
    assert not any("shared" in name for name in MoE(8, 4, 6).state_dict())


def test_dropout_scales_hidden_neurons_while_training_only():
    torch.manual_seed(0)
    layer = MoE(4, 1, 4000, lambda dim: TopK(dim, 1), dropout=0.25, num_shared=1)
    plain = MoE(4, 1, 4000, lambda dim: TopK(dim, 1), num_shared=1)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(6, 4)
    assert not torch.equal(layer(x)[0], layer(x)[0])
    assert torch.equal(layer.eval()(x)[0], plain(x)[0])
    with torch.no_grad():  # all hidden neurons 1, summed up: the share that is left, scaled back to 1
        for part in (layer.cohorts[0], layer.shared):
            for name, value in (("w_in", 0.0), ("b_in", 1.0), ("w_out", 1 / 4000), ("b_out", 0.0)):
                getattr(part, name).fill_(value)
    layer.train()
    out = layer(x)[0]
    torch.testing.assert_close(out, torch.full_like(out, 2.0), atol=0.15, rtol=0)
    assert (out != 2.0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("router", [TopK, ExpertChoice])
def test_cohorts_of_different_width_are_computed_each_in_its_own(router, dtype):
    torch.manual_seed(0)
    layer = MoE(8, 2, 4, router).to(dtype)
    layer.grow(2, hidden=12)
    layer.grow(1, "zero_output", hidden=7)
    assert [c.hidden for c in layer.cohorts] == [4, 12, 7]
    x = torch.randn(2, 6, 8, dtype=dtype)
    out, routing = layer(x)
    experts = [(c, e) for c in layer.cohorts for e in range(c.num_experts)]
    expected = torch.zeros_like(out).reshape(-1, 8)
    for t, i, weight, kept in zip(*routing.pairs(), strict=True):
        (c, e), row = experts[i], x.reshape(-1, 8)[t]
        hidden = torch.relu(row @ c.w_in[e] + c.b_in[e])
        expected[t] += kept * weight * (hidden @ c.w_out[e] + c.b_out[e])
    torch.testing.assert_close(out, expected.reshape(out.shape))


def test_a_copy_ranks_the_experts_of_its_width_only():
    layer = MoE(8, 3, 4)
    layer.grow(2, hidden=12)
    load = torch.tensor([1.0, 5.0, 0.0, 9.0, 7.0])
    layer.grow(4, "copy", noise=0.0, load=load)
    layer.grow(2, "copy", noise=0.0, load=torch.cat([load, torch.zeros(4)]), hidden=12)
    for name, newborn in layer.cohorts[2].named_parameters():
        assert torch.equal(newborn, layer.cohorts[0].get_parameter(name)[[1, 0, 2, 1]])
    for name, newborn in layer.cohorts[3].named_parameters():
        assert torch.equal(newborn, layer.cohorts[1].get_parameter(name)[[0, 1]])
    with pytest.raises(InputError, match="width 4, 12") as error:
        layer.grow(2, "copy", hidden=5)
    assert error.value.key == "growth.hidden"
    assert len(layer.cohorts) == 4


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("make", [lambda: MoE(8, 4, 8), lambda: PEER(8, 16, heads=2, k=2)])
def test_numbers_that_are_none_are_named(make, value):
    layer, x = make(), torch.randn(3, 5, 8)
    x[1, 2, 3], x[2, 4, 0] = value, -value
    with pytest.raises(RunFailedError, match=r"(MoE|PEER) was given 2 of 15 tokens .*\n?.*token 7"):
        layer(x)
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[1, 2] = mask[2, 4] = False
    assert layer(x, mask)[0].isfinite().all(), "padding may hold anything"
    layer.eval()
    assert layer(torch.full((2, 8), 3e38))[1].kept.all(), "a sum that overflows is no broken number"


@pytest.mark.parametrize("layer", [MoE(8, 4, 8), DenseFFN(8)], ids=["moe", "dense"])
def test_devices_that_do_not_fit_are_named(layer):
    with pytest.raises(InputError, match=r"got: x on meta\nallowed: cpu"):
        layer(torch.randn(2, 8, device="meta"))
    with pytest.raises(InputError, match=r"got: mask on meta\nallowed: cpu"):
        layer(torch.randn(2, 8), torch.ones(2, dtype=torch.bool, device="meta"))
    with pytest.raises(InputError, match="floating"):
        layer(torch.tensor(1.0))


@pytest.mark.parametrize("options", [{"num_shared": -1}, {"dropout": 1.0}, {"dropout": -0.1}, {"hidden": 0}])
def test_wrong_options_name_their_key(options):
    with pytest.raises(InputError) as error:
        MoE(8, 4, **options)
    assert error.value.key == f"layer.{next(iter(options))}"
