"""How active hidden units are, against a loop over tokens and choices."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cl_moe.layers import PEER, PKM, DenseFFN, MoE, Switch, TopK
from cl_moe.layers.activity import Activity
from cl_moe.layers.retrieval import Retrieval
from cl_moe.seeds import seeded

DIM = 6


def inputs(mask_share=0.3):
    """x (3, 5, DIM) with NaN on padding, and the mask."""
    with seeded(1, "inputs"):
        x, mask = torch.randn(3, 5, DIM), torch.rand(3, 5) > mask_share
    return x.masked_fill(~mask.unsqueeze(-1), torch.nan), mask


def moe(**options):
    with seeded(0, "moe"):
        layer = MoE(DIM, num_experts=4, hidden=3, router=TopK(DIM, k=2), **options)
        layer.grow(2, hidden=5)
        for cohort in layer.cohorts:
            nn.init.normal_(cohort.key)
    return layer.eval()


def peer(**options):
    with seeded(0, "peer"):
        layer = PEER(DIM, 16, heads=2, k=3, key_dim=4, query_norm="none", **options)
        layer.grow(9)
    return layer.eval()


def moe_by_loop(layer, x_TD, routing, mask_T):
    """Every expert's units over the tokens routed to it, then the shared ones over all real tokens."""
    parts, expert = [], 0
    for cohort in layer.cohorts:
        for place in range(cohort.num_experts):
            rows = [
                layer.cohorts[0].activation(x_TD[t] @ cohort.w_in[place] + cohort.b_in[place]).abs()
                for t in range(len(x_TD))
                for e, kept in zip(routing.expert[t], routing.kept[t], strict=True)
                if e == expert and kept and mask_T[t]
            ]
            parts.append((rows, cohort.hidden))
            expert += 1
    if layer.shared is not None:
        rows = layer.shared.activation(x_TD[mask_T] @ layer.shared.w_in + layer.shared.b_in).abs()
        parts.append((list(rows), rows.shape[1]))
    total = [
        torch.stack(rows).double().sum(0) if rows else torch.zeros(size).double() for rows, size in parts
    ]
    return torch.cat(total), torch.cat([torch.full((size,), len(rows)) for rows, size in parts])


@pytest.mark.parametrize("options", [{}, {"num_shared": 2, "activation": "gelu"}, {"dropout": 0.5}])
@torch.no_grad()
def test_experts_units_count_the_tokens_routed_to_them(options):
    layer, (x, mask) = moe(**options), inputs()
    routing = layer(x, mask)[1]
    found = layer.hidden_activity(x, routing)
    total, reached = moe_by_loop(layer, x.reshape(-1, DIM), routing, mask.reshape(-1))
    assert torch.equal(found.reached, reached)
    torch.testing.assert_close(found.total, total, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_an_expert_that_nobody_chose_is_silent():
    with seeded(0, "switch"):
        layer = MoE(DIM, num_experts=3, hidden=2, router=Switch(DIM)).eval()
        layer.cohorts[0].key.zero_()
        layer.cohorts[0].key[1, 0] = 100.0
    x = torch.rand(7, DIM) + 0.1
    found = layer.hidden_activity(x, layer(x)[1])
    assert found.mean[[0, 1, 4, 5]].tolist() == [0] * 4
    assert found.reached[:2].tolist() == [0, 0]
    assert found.reached[2] > 0


@pytest.mark.parametrize("glu", [False, True])
@pytest.mark.parametrize("policy", ["compete", "sum"])
@torch.no_grad()
def test_a_peer_expert_is_one_unit_over_the_tokens_that_chose_it(glu, policy):
    layer, (x, mask) = peer(glu=glu, retrieval=Retrieval(policy=policy)), inputs()
    routing = layer(x, mask)[1]
    found = layer.hidden_activity(x, routing)
    tables = [
        torch.cat([getattr(cohort, name) for cohort in layer.cohorts])
        for name in ("u", "w")
        if glu or name == "u"
    ]
    total, reached = torch.zeros(25).double(), torch.zeros(25).long()
    for t, x_D in enumerate(x.reshape(-1, DIM)):
        for expert in routing.expert[t].tolist() if mask.reshape(-1)[t] else []:
            unit = layer.activation(tables[0][expert] @ x_D)
            total[expert] += (unit * (tables[1][expert] @ x_D if glu else 1)).abs().double()
            reached[expert] += 1
    assert torch.equal(found.reached, reached)
    torch.testing.assert_close(found.total, total, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_dense_units_are_reached_by_every_real_token():
    with seeded(0, "dense"):
        layer = DenseFFN(DIM, hidden=4)
    x, mask = inputs()
    found = layer.hidden_activity(x, layer(x, mask)[1])
    hidden = torch.relu(nn.functional.linear(x[mask], layer.linear_in.weight, layer.linear_in.bias))
    torch.testing.assert_close(found.mean, hidden.double().mean(0))
    assert found.reached.tolist() == [int(mask.sum())] * 4
    nothing = layer.hidden_activity(x[:0], layer(x[:0])[1])
    assert nothing.mean.tolist() == [0] * 4


@torch.no_grad()
def test_batches_add_up():
    layer, (x, _) = moe(num_shared=1), inputs(0.0)
    whole = layer.hidden_activity(x, layer(x)[1])
    parts = [layer.hidden_activity(part, layer(part)[1]) for part in (x[:1], x[1:])]
    added: Activity = parts[0].plus(parts[1])
    assert torch.equal(added.reached, whole.reached)
    torch.testing.assert_close(added.total, whole.total)


def test_layers_without_hidden_units_say_so():
    x = torch.randn(4, DIM)
    for layer in (DenseFFN(DIM), PKM(DIM, 16, heads=2, k=3, key_dim=4)):
        assert not layer.has_hidden_units
        assert layer.hidden_activity(x, layer(x)[1]) is None
    assert all(layer.has_hidden_units for layer in (DenseFFN(DIM, 3), moe(), peer()))
