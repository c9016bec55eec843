"""Numbers, dtypes and tokens that cannot be: named where they are given, and batches without tokens.

Legend: D width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

from cl_moe.errors import InputError, RunFailedError
from cl_moe.layers import (
    PEER,
    PKM,
    Capacity,
    DenseFFN,
    ExpertChoice,
    GShard,
    MixtureOfDepths,
    MoE,
    Retrieval,
    Scores,
    Switch,
    TopK,
    fold_load,
)

D = 8


class Staged(nn.Module):
    """A residual block that is a mixture of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = MoE(D, 4, 8)

    def forward(self, x, mask=None, cohorts=None):
        out, routing = self.experts(x, mask, cohorts)
        return x + out, routing


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "dense": partial(DenseFFN, D, 4),
    "dense glu": partial(DenseFFN, D, 4, glu=True),
    "peer": partial(PEER, D, 16, 2, 4),
    "pkm": partial(PKM, D, 16, 2, 4),
    "pkm own": partial(PKM, D, 16, 2, 4, retrieval=Retrieval("per_head", "per_cohort", "sigmoid", "sum")),
    "depth": lambda: MixtureOfDepths(Staged(), D, 0.5),
    "depth looking ahead": lambda: MixtureOfDepths(Staged(), D, 0.5, causal=False),
    **{r.__name__: partial(MoE, D, 4, 8, r) for r in (TopK, Switch, GShard, ExpertChoice)},
}
every_layer = pytest.mark.parametrize("name", LAYERS)


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    return LAYERS[name]()


@every_layer
def test_float64_stays_among_itself(name: str):
    layer, x = built(name), torch.randn(2, 4, D)
    for given, made in ((x.double(), layer), (x, LAYERS[name]().double())):
        with pytest.raises(InputError, match="float64") as caught:
            made(given)
        assert caught.value.key == "x (or layer.to)"
    layer.float()


@pytest.mark.parametrize("name", [name for name in LAYERS if "depth" not in name])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_goes_through_float32_and_back(name: str, dtype: torch.dtype):
    layer, x = built(name).eval(), torch.randn(2, 4, D).to(dtype)
    out, _ = layer(x)
    assert out.dtype == dtype
    assert torch.equal(out, layer(x.float())[0].to(dtype))


@pytest.mark.parametrize("name", [name for name in LAYERS if "dense" not in name])  # it routes nothing
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_token_that_is_not_finite_is_named(name: str, broken: float):
    layer, x = built(name), torch.randn(2, 4, D)
    x[1, 2, 3] = broken
    with pytest.raises(RunFailedError, match=r"1 of 8 tokens that are not finite \(the first is token 6\)"):
        layer(x)
    assert layer(x, torch.arange(8).view(2, 4) != 6)[0][0].isfinite().all(), "unless it is padding"


@every_layer
@pytest.mark.parametrize("training", [True, False])
def test_what_stands_on_padding_reaches_no_output_and_no_gradient(name: str, training: bool):
    results = []
    mask = torch.arange(6) < torch.tensor([[6], [3]])
    for filled in (0.0, float("nan"), float("inf")):
        layer = built(name).train(training)
        torch.manual_seed(1)
        x = torch.randn(2, 6, D).masked_fill(~mask.unsqueeze(-1), filled).requires_grad_()
        torch.manual_seed(2)  # a router may draw while it trains
        out, routing = layer(x, mask)
        (out[mask].square().sum() + sum(routing.losses.values())).backward()
        scores = [] if routing.scores is None else [routing.scores[mask.reshape(-1)]]
        grads = [p.grad for p in layer.parameters() if p.grad is not None]
        results.append([out[mask], *scores, *fold_load(routing), *grads, x.grad[mask]])
        assert routing.scores is None or routing.scores.isfinite().all()
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*results, strict=True))


@every_layer
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(0, D), (0, 3, D), (2, 0, D)])
def test_no_tokens_give_no_output(name: str, training: bool, shape: tuple[int, ...]):
    layer = built(name).train(training)
    for mask in (None, torch.ones(shape[:-1], dtype=torch.bool)):
        out, routing = layer(torch.empty(shape), mask)
        assert out.shape == shape
        load = fold_load(routing)
        assert (load.count.sum(), load.kept) == (0, 0)
        (out.sum() + sum(loss.nan_to_num() for loss in routing.losses.values())).backward()
        assert all(p.grad is None or not p.grad.any() for p in layer.parameters())


NUMBERS: list[tuple[Callable[[], object], str]] = [
    (lambda: MoE(0, 4, 8), "dim"),
    (lambda: MoE(-1, 4, 8), "dim"),
    (lambda: MoE(D, 2.5, 8), "layer.num_experts"),
    (lambda: MoE(D, 0, 8, ExpertChoice), "layer.num_experts"),
    (lambda: MoE(D, -1, 8), "layer.num_experts"),
    (lambda: MoE(D, 4, 8.0), "layer.hidden"),
    (lambda: MoE(D, 4, 8, num_shared=True), "layer.num_shared"),
    (lambda: PEER(D, 16.0), "layer.num_experts"),
    (lambda: PEER(D, 16, heads=1.5), "layer.heads"),
    (lambda: PEER(D, 16, k=2.0), "layer.k"),
    (lambda: PKM(0, 16), "dim"),
    (lambda: DenseFFN(D, -1), "layer.hidden"),
    (lambda: DenseFFN(D, 0), "layer.hidden"),
    (lambda: TopK(k=1.5), "router.k"),
    (lambda: TopK(k=True), "router.k"),
    (lambda: TopK(balance=float("inf")), "router.balance"),
    (lambda: Switch(z_loss=float("nan")), "router.z_loss"),
    (lambda: Switch(min_capacity=1.5), "router.min_capacity"),
    (lambda: Switch(init_scale=0), "router.init_scale"),
    (lambda: Switch(init_scale=-1), "router.init_scale"),
    (lambda: Switch(capacity_factor=float("inf")), "router.capacity_factor"),
    (lambda: GShard(threshold=float("nan")), "router.threshold"),
    (lambda: Capacity(min_slots=0.5), "router.capacity.min_slots"),
    (lambda: Scores(bias_rate=float("inf")), "router.scores.bias_rate"),
    (lambda: MixtureOfDepths(Staged(), D, predictor_weight=float("inf")), "model.depth.predictor_weight"),
    (lambda: MoE(D, 4, 8).grow(2.0), "growth.num_experts"),
    (lambda: MoE(D, 4, 8).grow(True), "growth.num_experts"),
    (lambda: MoE(D, 4, 8).grow(2, "copy", noise=float("nan")), "growth.noise"),
    (lambda: PEER(D, 16, k=4).grow(9, "copy", noise=-1), "growth.noise"),
    (lambda: MoE(D, 2, 8).grow(2, "copy", load=torch.tensor([1.0, float("nan")])), "load"),
    (lambda: PKM(D, 4, k=2).grow(4, "copy", load=torch.tensor([1.0, -1.0, 0.0, 0.0])), "load"),
    (lambda: MoE(D, 2, 8).grow(2, hidden=1.5), "growth.hidden"),
    (lambda: MoE(D, 4, 8).freeze(0), "cohorts"),
    (lambda: MoE(D, 4, 8)(torch.randn(3, D), cohorts=0), "cohorts"),
]


@pytest.mark.parametrize(("make", "key"), NUMBERS)
def test_a_number_that_cannot_be_names_its_key(make: Callable[[], object], key: str):
    with pytest.raises(InputError) as caught:
        make()
    assert caught.value.key == key


def test_a_refused_growth_leaves_no_newborns():
    layer = MoE(D, 4, 8)
    with pytest.raises(InputError):
        layer.grow(2, "copy", noise=float("nan"))
    assert layer.cohort_sizes == (4,)
    assert all(p.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("router", [TopK, Switch, GShard, ExpertChoice])
def test_a_router_of_another_width_is_refused_and_one_of_no_width_serves_all(
    router: Callable[..., nn.Module],
):
    with pytest.raises(InputError) as caught:
        MoE(D, 4, 8, router(dim=2 * D))
    assert caught.value.key == "router (or dim)"
    keys = []
    for made in (router(), router(dim=D), router(D), router, partial(router, dim=D)):
        torch.manual_seed(0)
        keys.append(MoE(D, 4, 8, made).cohorts[0].key)
    assert all(torch.equal(key, keys[0]) for key in keys)


@pytest.mark.parametrize("cohorts", [[], [0, 0], [1], [-1], [0.5], ["0"], 0])
def test_cohorts_that_there_are_not_are_named(cohorts: object):
    with pytest.raises(InputError) as raised:
        MoE(8, 4, 8)(torch.randn(3, 8), cohorts=cohorts)
    assert raised.value.key == "cohorts"
