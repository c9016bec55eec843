"""Gated feed-forward layers and experts, and the activations by name.

Legend: T tokens, D width, H hidden width.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.special import erf, expit
from scipy.stats import norm

from cl_moe.errors import InputError
from cl_moe.layers import PEER, DenseFFN, MoE, TopK
from cl_moe.layers.peer import balanced_value_std
from cl_moe.layers.precision import ACTIVATIONS, activation_by_name

NUMPY = {
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: x * (1 + erf(x / np.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2,
    "silu": lambda x: x * expit(x),
}


def plain(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().numpy()


def test_every_activation_has_an_oracle():
    assert NUMPY.keys() == ACTIVATIONS.keys()


@pytest.mark.parametrize("name", NUMPY)
def test_activations_equal_their_formulas(name):
    x = torch.linspace(-8, 8, 201, dtype=torch.float64)
    np.testing.assert_allclose(plain(activation_by_name(name)(x)), NUMPY[name](x.numpy()), atol=1e-12)


@pytest.mark.parametrize("name", NUMPY)
def test_peer_starts_as_varied_as_the_dense_layer_it_replaces(name):
    def square_mean(std: float) -> float:
        return quad(lambda t: NUMPY[name](std * t) ** 2 * norm.pdf(t), -10, 10)[0]

    heads, k = 4, 8
    expected = (square_mean(3**-0.5) / 3) * k / (heads * square_mean(1.0))
    np.testing.assert_allclose(balanced_value_std(name, heads, k), expected**0.5, rtol=2e-3)
    assert PEER(8, 16, heads=2, k=2, activation=name, glu=True)(torch.randn(3, 8))[0].isfinite().all()


@pytest.mark.parametrize("name", NUMPY)
def test_a_gated_dense_layer_equals_its_formula(name):
    torch.manual_seed(0)
    layer = DenseFFN(5, 7, name, glu=True).double()
    x_TD = torch.randn(2, 6, 5, dtype=torch.float64)
    maps = [getattr(layer, f"linear_{part}") for part in ("in", "up", "out")]
    (w, b), (v, c), (w2, b2) = [(plain(one.weight), plain(one.bias)) for one in maps]
    hidden = NUMPY[name](x_TD.numpy() @ w.T + b) * (x_TD.numpy() @ v.T + c)
    np.testing.assert_allclose(plain(layer(x_TD)[0]), hidden @ w2.T + b2, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_one_gated_expert_equals_the_gated_dense_layer(bias):
    torch.manual_seed(0)
    dense, layer = (
        DenseFFN(8, 12, "silu", glu=True),
        MoE(8, 1, 12, partial(TopK, k=1), "silu", bias, glu=True),
    )
    with torch.no_grad():
        for name in ("in", "up", "out"):
            linear = getattr(dense, f"linear_{name}")
            getattr(layer.cohorts[0], f"w_{name}")[0] = linear.weight.t()
            if bias:
                getattr(layer.cohorts[0], f"b_{name}")[0] = linear.bias
            else:
                linear.bias.zero_()
    x = torch.randn(3, 5, 8)
    torch.testing.assert_close(layer(x)[0], dense(x)[0])


def test_gated_shared_experts_are_experts_that_everyone_passes():
    torch.manual_seed(0)
    layer = MoE(8, 4, 6, num_shared=2, activation="silu", glu=True).double()
    x, s = torch.randn(5, 8, dtype=torch.float64), layer.shared
    expected = np.zeros((5, 8))
    for e in range(2):
        own = slice(6 * e, 6 * e + 6)
        hidden = NUMPY["silu"](plain(x @ s.w_in[:, own] + s.b_in[own]))
        hidden = hidden * plain(x @ s.w_up[:, own] + s.b_up[own])
        expected = expected + hidden @ plain(s.w_out[own]) + plain(s.b_out[e])
    np.testing.assert_allclose(plain(s(x)), expected, atol=1e-12)


def test_gated_experts_grow_and_only_they_have_a_third_map():
    torch.manual_seed(0)
    layer = MoE(8, 4, 6, glu=True)
    x = torch.randn(5, 8)
    before = layer(x)[0]
    layer.grow(2, "copy", noise=0.0)
    layer.grow(2, "zero_output", hidden=9)
    assert torch.equal(layer.cohorts[1].w_up, layer.cohorts[0].w_up[:2])
    assert layer.cohorts[2].w_up.shape == (2, 8, 9)
    assert layer(x, cohorts=[2])[0].abs().max() == 0
    assert torch.equal(layer(x, cohorts=[0])[0], before)
    assert not any("up" in name for one in (MoE(8), DenseFFN(8, 6)) for name in one.state_dict())


def test_a_gate_needs_a_hidden_width():
    with pytest.raises(InputError, match="single linear map") as error:
        DenseFFN(8, glu=True)
    assert error.value.key == "layer.glu"
    with pytest.raises(InputError, match="relu or gelu or gelu_tanh or silu"):
        DenseFFN(8, 6, "swish")
