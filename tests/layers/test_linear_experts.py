"""Experts of one linear map, and a router that sends whole sequences."""

import pytest
import torch

from cl_moe.errors import InputError
from cl_moe.layers import DenseFFN, MoE, TopK
from cl_moe.layers.upcycle import upcycle


def layer_of(k: int = 2, level: str = "token", **options) -> MoE:
    torch.manual_seed(0)
    return MoE(6, 4, None, lambda dim: TopK(dim, k, level=level), **options).double()


def by_hand(layer: MoE, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Token by token, expert by expert; a sequence is a row of ``x``."""
    weights = torch.cat([cohort.w_in for cohort in layer.cohorts])
    biases = torch.cat([cohort.b_in for cohort in layer.cohorts])
    keys = torch.cat([cohort.key for cohort in layer.cohorts])
    out = torch.zeros_like(x)
    for b, sequence in enumerate(x):
        real = range(len(sequence)) if mask is None else [s for s in range(len(sequence)) if mask[b, s]]
        together = sequence[list(real)].mean(dim=0)
        for s in real:
            logits = keys @ (together if layer.router.level == "sequence" else sequence[s])
            best, gates = logits.topk(layer.router.k).indices, logits.topk(layer.router.k).values.softmax(0)
            out[b, s] = sum(
                g * (sequence[s] @ weights[e] + biases[e]) for g, e in zip(gates, best, strict=True)
            )
    return out


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_output_and_gradients_are_those_of_a_loop(level: str, masked: bool) -> None:
    layer = layer_of(level=level)
    layer.grow(3)
    x = torch.randn(3, 5, 6, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(3, 5) > 0.3 if masked else None
    out, expected = layer(x, mask)[0], by_hand(layer, x, mask)
    torch.testing.assert_close(out, expected)
    learning = [x, *layer.parameters()]
    ours = torch.autograd.grad(out.square().sum(), learning)
    theirs = torch.autograd.grad(expected.square().sum(), learning)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("bias", [False, True])
def test_compiled_it_computes_the_same(bias: bool) -> None:
    layer, x = layer_of(bias=bias), torch.randn(2, 5, 6, dtype=torch.float64)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x)[0], layer(x)[0])


def test_a_sequence_is_sent_as_one_whatever_its_padding_holds() -> None:
    layer = layer_of(k=1, level="sequence")
    x = torch.randn(20, 5, 6, dtype=torch.float64)
    mask = torch.ones(20, 5, dtype=torch.bool)
    mask[:, 3:] = False
    mask[0] = False
    _, routing = layer(x, mask)
    chosen = routing.expert.view(20, 5)
    assert (chosen == chosen[:, :1]).all()
    assert len(chosen[:, 0].unique()) > 1, "not all of them to one"
    x[:, 3:] = float("nan")
    assert torch.equal(layer(x, mask)[1].expert.view(20, 5)[1:], chosen[1:])
    assert torch.equal(layer(x[1:, :3].contiguous())[1].expert.view(19, 3), chosen[1:, :3])


def test_only_a_router_of_tokens_is_causal() -> None:
    assert layer_of().causal
    assert not layer_of(level="sequence").causal


def test_newborns_are_linear_too_and_silent_where_asked() -> None:
    layer, x = layer_of(k=1), torch.randn(7, 6, dtype=torch.float64)
    layer.grow(2, "zero_output")
    assert not layer(x, cohorts=[1])[0].any()
    layer.grow(2, "copy", noise=0.0, load=torch.tensor([0.0, 3.0, 0.0, 1.0, 0.0, 0.0]))
    assert torch.equal(layer.cohorts[2].w_in, layer.cohorts[0].w_in[[1, 3]])
    assert layer.active_parameters() < sum(p.numel() for p in layer.parameters())
    assert not layer.has_hidden_units
    assert layer.hidden_activity(x, layer(x)[1]) is None


@pytest.mark.parametrize("options", [{"num_shared": 1}, {"dropout": 0.1}, {"glu": True}])
def test_what_needs_hidden_units_is_refused(options: dict) -> None:
    with pytest.raises(InputError, match=r"layer\.hidden"):
        MoE(6, 4, None, **options)


def test_what_one_map_cannot_be_is_refused() -> None:
    with pytest.raises(InputError, match=r"growth\.hidden"):
        layer_of().grow(2, hidden=8)
    with pytest.raises(InputError, match="one linear map"):
        upcycle(MoE(6, 4, None), DenseFFN(6, 8))
    with pytest.raises(InputError, match=r"router\.level"):
        TopK(6, level="batch")
