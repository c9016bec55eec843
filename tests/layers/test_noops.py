"""No-op experts, the integrated mixture of depths and experts: chosen like all others, they do nothing.

Legend: T tokens, D width; n experts that compute and z no-ops at the start.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cl_moe.errors import InputError
from cl_moe.layers import (
    Capacity,
    Cohort,
    DenseFFN,
    ExpertChoice,
    GShard,
    MoE,
    Scores,
    Switch,
    TopK,
    fold_load,
)
from cl_moe.layers.upcycle import upcycle

D, n, z = 8, 3, 2
ROUTERS = {
    "switch": partial(Switch, jitter=0),
    "top_k": TopK,
    "top_k_sigmoid": partial(TopK, k=3, scores=Scores("sigmoid", 1e-3)),
    "gshard": partial(GShard, second="all", capacity=Capacity(1.0, 1.0, 1)),
    "expert_choice": ExpertChoice,
}


def built(router="top_k", seed: int = 0, **options) -> MoE:
    torch.manual_seed(seed)
    return MoE(D, n, 6, ROUTERS.get(router, router), **({"num_noops": z} | options))


def drawn_to_noops(layer: MoE) -> MoE:
    """The same layer, with keys by which positive tokens prefer the no-ops."""
    with torch.no_grad():
        layer.cohorts[0].key[n:] = 3.0
    return layer


def test_a_token_that_chose_them_alone_passes_by():
    layer = drawn_to_noops(built(partial(TopK, k=2)))
    x = torch.rand(4, 5, D, requires_grad=True)
    out, routing = layer(x)
    assert out.abs().max() == 0
    assert torch.equal(x + out, x)
    assert routing.kept.all(), "nothing was dropped"
    torch.testing.assert_close(routing.weight.sum(dim=1), torch.ones(20))
    load = fold_load(routing)
    assert (routing.num_experts, load.count.tolist()) == (n + z, [0, 0, 0, 20, 20])
    (out.sum() + routing.losses["balance"]).backward()
    weights = {name: p.grad for name, p in layer.cohorts[0].named_parameters() if name != "key"}
    assert all((gradient == 0).all() for gradient in weights.values())
    assert layer.cohorts[0].key.grad[n:].abs().max() > 0, "the balance loss knows them"


def test_they_have_a_key_and_a_bias_each_and_no_weights():
    layer = built("top_k_sigmoid")
    sizes = {name: len(value) for name, value in layer.cohorts[0].state_dict().items()}
    assert sizes == {"w_in": n, "b_in": n, "w_out": n, "b_out": n, "key": n + z, "selection_bias": n + z}
    assert layer.cohort_sizes == (n + z,)
    layer.after_step(torch.tensor([0, 0, 0, 9, 0]))
    bias = layer.cohorts[0].selection_bias
    assert bias[3] < 0 < bias[4], "they are balanced like all others"


@pytest.mark.parametrize("name", ROUTERS)
def test_nothing_is_computed_for_their_pairs(name, monkeypatch):
    layer = built(name)
    layer.grow(2)
    rows, forward = [], Cohort.forward
    monkeypatch.setattr(Cohort, "forward", lambda self, x, s: rows.append(len(x)) or forward(self, x, s))
    _, routing = layer(torch.randn(3, 9, D))
    _, expert_P, _, kept_P = routing.pairs()
    noop_P = (expert_P >= n) & (expert_P < n + z)
    assert (noop_P & kept_P).any()
    assert sum(rows) == int((kept_P & ~noop_P).sum())
    assert rows[1] == int((kept_P & (expert_P >= n + z)).sum())


@given(st.lists(st.integers(0, 9), min_size=n + z + 2, max_size=n + z + 2), st.integers(1, 9))
def test_a_newborn_is_never_a_copy_of_one(load, newborns):
    layer = built("top_k_sigmoid")
    layer.cohorts[0].selection_bias.copy_(torch.arange(n + z))
    layer.grow(2)
    layer.grow(newborns, "copy", noise=0.0, load=torch.tensor(load).double())
    computing = [0, 1, 2, 5, 6]
    best = sorted(computing, key=lambda e: (-load[e], e))
    keys = torch.cat([cohort.key for cohort in layer.cohorts])
    weights = {
        e: (layer.cohorts[0].w_in[e] if e < n else layer.cohorts[1].w_in[e - n - z]) for e in computing
    }
    for place in range(newborns):
        source = best[place % len(best)]
        assert torch.equal(layer.cohorts[2].key[place], keys[source])
        assert torch.equal(layer.cohorts[2].w_in[place], weights[source])
    biases = torch.cat([cohort.selection_bias for cohort in layer.cohorts])
    assert torch.equal(biases[n + z + 2 :], biases[[best[i % len(best)] for i in range(newborns)]])
    assert layer.cohorts[2].num_noops == 0


@pytest.mark.parametrize("name", ROUTERS)
def test_they_are_asked_for_and_frozen_with_their_cohort(name):
    layer = built(name)
    x = torch.randn(3, 9, D)
    before = layer.eval()(x)
    layer.freeze()
    state = {key: value.clone() for key, value in layer.state_dict().items()}
    layer.grow(4)
    alone = layer(x, cohorts=[0])
    assert torch.equal(alone[0], before[0])
    assert torch.equal(alone[1].expert, before[1].expert), "old ids are for life"
    assert torch.equal(alone[1].scores[:, : n + z], before[1].scores)
    young = layer.train()(x, cohorts=[1])
    assert (young[1].expert >= n + z).all()
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    out, routing = layer(x)
    (out.square().sum() + sum(routing.losses.values())).backward()
    optimizer.step()
    layer.after_step(fold_load(routing).count)
    assert all(torch.equal(layer.state_dict()[key], value) for key, value in state.items())


@pytest.mark.parametrize("name", ROUTERS)
def test_a_grown_layer_comes_back_to_the_bit(name):
    layer = built(name)
    layer.grow(4, "copy")
    again = built(name, seed=1)
    again.grow(4)
    again.load_state_dict(layer.state_dict())
    x = torch.randn(3, 9, D)
    assert torch.equal(again(x)[0], layer(x)[0])


def test_a_shared_expert_serves_those_that_pass_by():
    layer = drawn_to_noops(built(partial(TopK, k=2), num_shared=1))
    x = torch.rand(4, D)
    assert torch.equal(layer(x)[0], layer.shared(x))


def test_exact_upcycling_is_refused_and_the_other_copies_all_that_compute():
    dense = DenseFFN(D, 6)
    with pytest.raises(InputError, match="2 no-op experts") as error:
        upcycle(built(), dense)
    assert error.value.key == "layer.num_noops (or exact)"
    layer = built()
    upcycle(layer, dense, exact=False)
    assert torch.equal(layer.cohorts[0].w_in, dense.linear_in.weight.t().expand(n, D, 6))


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"num_noops": -1}, "layer.num_noops"),
        ({"num_experts": 0, "num_noops": 4}, "layer.num_experts"),
        ({"num_experts": 1, "num_noops": 1, "router": partial(TopK, k=3)}, "router.k"),
    ],
)
def test_wrong_numbers_name_their_key(options, key):
    with pytest.raises(InputError) as error:
        MoE(D, **options)
    assert error.value.key == key


def test_newborns_alone_must_be_enough_for_the_router():
    layer = built(partial(TopK, k=5))
    assert layer(torch.randn(4, D))[1].expert.sort(dim=1).values.eq(torch.arange(5)).all()
    layer.grow(2)
    with pytest.raises(InputError, match=r"router\.k"):
        layer(torch.randn(4, D), cohorts=[1])
