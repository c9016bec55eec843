"""Experts that start as copies: the same function where that can be promised, an error where it cannot."""

from __future__ import annotations

from functools import partial
from itertools import permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from cl_moe.errors import InputError
from cl_moe.layers import PEER, DenseFFN, GShard, MoE, Scores, Switch, TopK
from cl_moe.layers.upcycle import linear_maps, upcycle


class Conv1D(nn.Module):
    """Written as GPT-2's feed-forward layers are: a linear map with its weight transposed."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Gated(nn.Module):
    """A gated linear unit, as in Llama; its maps registered in some order."""

    def __init__(
        self, order: tuple[str, ...] = ("gate", "up", "down"), dim: int = 4, hidden: int = 6
    ) -> None:
        super().__init__()
        for name in order:
            self.add_module(name, nn.Linear(*((hidden, dim) if name == "down" else (dim, hidden))))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.gate(x)) * self.up(x))


class Fused(nn.Module):
    """A gated linear unit with one map for both factors, as in Phi-3; or with its halves exchanged."""

    def __init__(self, gate_first: bool, bias: bool) -> None:
        super().__init__()
        self.both, self.down = nn.Linear(4, 12, bias=bias), nn.Linear(6, 4, bias=bias)
        self.gate_first = gate_first

    def forward(self, x: Tensor) -> Tensor:
        one, other = self.both(x).chunk(2, dim=-1)
        gate, up = (one, other) if self.gate_first else (other, one)
        return self.down(up * torch.relu(gate))


def mixture(dim: int = 4, hidden: int | None = 6, **options: object) -> MoE:
    return MoE(dim, hidden=hidden, **({"num_experts": 3, "router": partial(TopK, k=2)} | options))


DENSE = {
    "own": lambda: DenseFFN(4, 6),
    "sequential": lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Dropout(0.3), nn.Linear(6, 4)),
    "without biases": lambda: nn.Sequential(
        nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 4, bias=False)
    ),
    "conv1d": lambda: nn.Sequential(Conv1D(6, 4), nn.ReLU(), Conv1D(4, 6)),
}


def answer(dense: nn.Module, x: Tensor) -> Tensor:
    out = dense.eval()(x)
    return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize("dense", DENSE.values(), ids=DENSE)
def test_every_expert_is_a_copy_and_the_source_stays(dense):
    torch.manual_seed(0)
    dense, layer = dense(), mixture()
    before, keys = [p.clone() for p in dense.parameters()], layer.cohorts[0].key.clone()
    upcycle(layer, dense)
    first, second = linear_maps(dense)
    for e in range(3):
        assert torch.equal(layer.cohorts[0].w_in[e], first.weight)
        assert torch.equal(layer.cohorts[0].w_out[e], second.weight)
        zero = torch.zeros(6)
        assert torch.equal(layer.cohorts[0].b_in[e], zero if first.bias is None else first.bias)
    assert torch.equal(layer.cohorts[0].key, keys), "the router starts as it was drawn"
    assert all(torch.equal(a, b) for a, b in zip(before, dense.parameters(), strict=True))
    assert all(p.requires_grad and p.is_leaf for p in layer.parameters())


@given(
    dim=st.integers(1, 6),
    hidden=st.integers(1, 6),
    num_experts=st.integers(1, 5),
    k=st.integers(1, 5),
    tokens=st.integers(1, 7),
    activation=st.sampled_from(["relu", "gelu", "gelu_tanh", "silu"]),
    glu=st.booleans(),
)
def test_the_function_is_unchanged(dim, hidden, num_experts, k, tokens, activation, glu):
    dense = DenseFFN(dim, hidden, activation, glu).double()
    router = partial(TopK, k=min(k, num_experts))
    layer = MoE(dim, num_experts, hidden, router, activation, glu=glu).double()
    upcycle(layer, dense)
    x = torch.randn(2, tokens, dim, dtype=torch.float64)
    torch.testing.assert_close(layer(x)[0], answer(dense, x), rtol=1e-10, atol=1e-10)


GATED = {
    **{"-".join(order): partial(Gated, order) for order in permutations(("gate", "up", "down"))},
    "square": partial(Gated, dim=4, hidden=4),
    **{f"fused {first} {bias}": partial(Fused, first, bias) for first in (True, False) for bias in (0, 1)},
}


@pytest.mark.parametrize("dense", GATED.values(), ids=GATED)
def test_a_gated_unit_is_read_by_what_it_computes(dense):
    torch.manual_seed(0)
    dense = dense().double()
    layer = mixture(hidden=4 if dense.down.in_features == 4 else 6, glu=True).double()
    upcycle(layer, dense)
    assert torch.equal(layer.cohorts[0].w_out[2], dense.down.weight.t())
    x = torch.randn(9, 4, dtype=torch.float64)
    torch.testing.assert_close(layer(x)[0], answer(dense, x), rtol=1e-10, atol=1e-10)


def test_copies_of_a_single_precision_layer_keep_their_bits_and_precision():
    torch.manual_seed(0)
    dense, layer = DenseFFN(4, 6), mixture()
    upcycle(layer, dense)
    x = torch.randn(5, 4)
    assert layer(x)[0].dtype == torch.float32
    torch.testing.assert_close(layer(x)[0], answer(dense, x))


def test_copies_part_as_they_learn():
    torch.manual_seed(0)
    layer = mixture()
    upcycle(layer, DenseFFN(4, 6))
    layer(torch.randn(64, 4))[0].square().sum().backward()
    gradient = layer.cohorts[0].w_in.grad
    assert not torch.allclose(gradient[0], gradient[1])


def test_noise_makes_them_differ():
    torch.manual_seed(0)
    layer = mixture()
    upcycle(layer, DenseFFN(4, 6), noise=0.1)
    weight = layer.cohorts[0].w_in
    assert not torch.equal(weight[0], weight[1])
    assert (weight[0] - weight[1]).abs().max() < 0.5


@pytest.mark.parametrize("router", [Switch, GShard, partial(TopK, k=1, normalize="all")])
def test_gates_that_do_not_sum_to_1_are_refused_unless_asked_for(router):
    torch.manual_seed(0)
    dense, layer = DenseFFN(4, 6), mixture(router=router)
    before = layer.cohorts[0].w_in.clone()
    with pytest.raises(InputError, match="do not sum to 1"):
        upcycle(layer, dense)
    assert torch.equal(layer.cohorts[0].w_in, before)
    upcycle(layer, dense, exact=False)
    assert torch.equal(layer.cohorts[0].w_in[1], dense.linear_in.weight.t())
    x = torch.randn(4).expand(1, 64, 4)  # all want the same experts: a capacity drops some
    assert not torch.allclose(layer.eval()(x)[0], answer(dense, x)), "it was refused for nothing"


def test_an_expert_beside_the_routed_ones_is_refused_unless_asked_for():
    with pytest.raises(InputError, match="or what stands beside it"):
        upcycle(mixture(num_shared=1), DenseFFN(4, 6))
    upcycle(mixture(num_shared=1), DenseFFN(4, 6), exact=False)


def test_sigmoid_scores_that_are_normalised_and_dropout_pass():
    torch.manual_seed(0)
    dense, layer = DenseFFN(4, 6), mixture(router=partial(TopK, scores=Scores("sigmoid")), dropout=0.5)
    upcycle(layer, dense)
    x = torch.randn(9, 4)
    torch.testing.assert_close(layer.eval()(x)[0], answer(dense, x))


@pytest.mark.parametrize(
    ("layer", "dense", "message"),
    [
        (lambda: PEER(4, 16), DenseFFN(4, 6), "upcycling into PEER"),
        (mixture, Gated(), "a gated unit has three; experts have them with layer.glu=true"),
        (partial(mixture, glu=True), DenseFFN(4, 6), "with 2 linear maps"),
        (partial(mixture, glu=True, activation="silu"), Gated(), "computes something else"),
        (partial(mixture, glu=True, hidden=5), Gated(), "allowed: hidden=6 and dim=4"),
        (partial(mixture, glu=True, bias=False), Gated(), "layer.bias"),
        (partial(mixture, activation="gelu_tanh"), DenseFFN(4, 6, "gelu"), "computes something else"),
        (mixture, Fused(True, True), "experts of 4 x 6 for a map of 4 x 12"),
        (mixture, DenseFFN(4), "with 1 linear maps(.|\\n)*change: layer.hidden of the dense run"),
        (mixture, DenseFFN(4, 6, "gelu"), "computes something else"),
        (mixture, nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)), "computes something else"),
        (mixture, nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU()), "something else"),
        (lambda: mixture(hidden=5), DenseFFN(4, 6), "allowed: hidden=6 and dim=4"),
        (lambda: mixture(bias=False), DenseFFN(4, 6), "layer.bias"),
    ],
)
def test_what_cannot_be_copied_is_refused(layer, dense, message):
    with pytest.raises(InputError, match=message):
        upcycle(layer(), dense)
    if message == "computes something else":
        with pytest.raises(InputError, match=message):
            upcycle(layer(), dense, exact=False)


@pytest.mark.parametrize(
    ("layer", "options", "key"),
    [
        (partial(mixture, num_shared=1), {}, "router.normalize (or exact)"),
        (mixture, {"noise": -1.0}, "noise"),
        (mixture, {"noise": float("nan")}, "noise"),
    ],
)
def test_a_refused_layer_is_as_it_was(layer, options, key):
    into = layer()
    before = {name: value.clone() for name, value in into.state_dict().items()}
    with pytest.raises(InputError) as caught:
        upcycle(into, DenseFFN(into.dim, into.hidden), **options)
    assert caught.value.key == key
    assert all(torch.equal(value, before[name]) for name, value in into.state_dict().items())


def test_frozen_experts_are_not_overwritten_unless_a_fresh_layer_is_filled():
    into = mixture()
    dense = DenseFFN(into.dim, into.hidden)
    into.freeze([0])
    into.grow(2)
    before = into.cohorts[0].w_in.clone()
    with pytest.raises(InputError, match="frozen"):
        upcycle(into, dense)
    assert torch.equal(into.cohorts[0].w_in, before)
    upcycle(into, dense, allow_frozen=True)
    assert torch.equal(into.cohorts[0].w_in[0], dense.linear_in.weight.t())
    assert into.frozen_cohorts == (True, False)


def test_a_list_of_layers_computes_nothing_to_be_copied():
    maps = nn.ModuleList([nn.Linear(4, 8), nn.Linear(8, 4)])
    with pytest.raises(InputError, match="ModuleList, which computes nothing by itself"):
        upcycle(mixture(4, 8), maps)
