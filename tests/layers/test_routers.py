import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cl_moe.errors import InputError
from cl_moe.layers import Candidates, MoE, Switch, Tokens, TopK


def candidates(*keys, live=None):
    num = sum(key.shape[0] for key in keys)
    live = torch.ones(num, dtype=torch.bool) if live is None else torch.tensor(live)
    return Candidates(keys, torch.arange(num), live, num)


@given(st.data())
def test_capacity_is_counted_in_token_order_within_a_sequence(data):
    groups, size, experts = (data.draw(st.integers(1, high)) for high in (4, 9, 4))
    factor = data.draw(st.sampled_from([0.25, 0.5, 1.0, 1.3]))
    rounding = data.draw(st.sampled_from(["ceil", "floor"]))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    router = Switch(4, eval_capacity_factor=factor, min_capacity=1, rounding=rounding).eval()
    valid = torch.rand(groups * size) > data.draw(st.sampled_from([0.0, 0.4, 1.0]))
    x = torch.randn(groups * size, 4) * valid[:, None]
    routing = router(Tokens(x, valid, size), candidates(torch.randn(experts, 4)))
    for g in range(groups):
        real = int(valid[g * size : (g + 1) * size].sum())
        capacity = max(1, getattr(math, rounding)(round(real * factor / experts, 9)))
        taken = dict.fromkeys(range(experts), 0)
        for t in range(g * size, (g + 1) * size):
            expert = int(routing.expert[t, 0])
            expected = bool(valid[t]) and taken[expert] < capacity
            taken[expert] += bool(valid[t])
            assert bool(routing.kept[t, 0]) == expected
            assert (routing.weight[t, 0] > 0) == expected


def test_capacity_uses_the_factor_of_the_mode_and_a_minimum():
    x, key = torch.ones(40, 4), candidates(torch.tensor([[1.0] * 4, [0.0] * 4]))
    router = Switch(4, capacity_factor=1.0, eval_capacity_factor=1.5, min_capacity=4, jitter=0)
    assert router(Tokens(x, None, 40), key).kept.sum() == 20
    assert router.eval()(Tokens(x, None, 40), key).kept.sum() == 30
    assert router(Tokens(x, None, 4), key).kept.sum() == 40  # 10 sequences of 4: 3 slots, at least 4


def test_a_sequence_does_not_depend_on_its_batch():
    for router in (lambda dim: Switch(dim, min_capacity=1), TopK):
        layer = MoE(8, 4, 8, router).eval()
        x = torch.randn(5, 16, 8)
        out, routing = layer(x)
        alone, alone_routing = layer(x[2:3])
        assert torch.equal(alone_routing.kept, routing.kept[32:48])
        assert torch.equal(alone_routing.expert, routing.expert[32:48])
        torch.testing.assert_close(alone[0], out[2])


def test_jitter_acts_in_training_only():
    layer = MoE(8, 4, 8, lambda dim: Switch(dim, jitter=0.3))
    x = torch.randn(2, 8, 8)
    assert not torch.equal(layer(x)[1].scores, layer(x)[1].scores)
    layer.eval()
    assert torch.equal(layer(x)[1].scores, layer(x)[1].scores)


def test_gates_are_softmax_over_what_the_option_says():
    key, x = torch.randn(6, 4), torch.randn(9, 4)
    logits = x @ key.t()
    top = logits.topk(3)
    selected = TopK(4, 3, "selected")(Tokens(x, None, 1), candidates(key))
    torch.testing.assert_close(selected.weight, top.values.softmax(-1))
    over_all = TopK(4, 3, "all")(Tokens(x, None, 1), candidates(key))
    torch.testing.assert_close(over_all.weight, logits.softmax(-1).gather(1, top.indices))
    switch = Switch(4, jitter=0)(Tokens(x, None, 9), candidates(key))
    torch.testing.assert_close(switch.weight, (logits.softmax(-1).max(-1, keepdim=True).values * switch.kept))


def test_ties_go_to_the_oldest_expert():
    key = torch.randn(2, 4)
    routing = TopK(4, 2)(Tokens(torch.randn(20, 4), None, 1), candidates(key, key, key))
    best = routing.expert.sort(dim=1).values
    assert torch.equal(best[:, 1] - best[:, 0], torch.full((20,), 2))
    assert best[:, 0].max() < 2


def test_routers_always_think_in_float32():
    layer = MoE(8, 4, 8).to(torch.bfloat16)
    out, routing = layer(torch.randn(6, 8, dtype=torch.bfloat16))
    assert routing.scores.dtype == routing.weight.dtype == torch.float32
    assert out.dtype == torch.bfloat16


def test_the_balance_loss_ignores_frozen_experts():
    layer = MoE(8, 4, 8, lambda dim: TopK(dim, 2, balance=1.0))
    layer.grow(4)
    x = torch.randn(30, 8, requires_grad=True)
    layer.freeze([0])
    _, routing = layer(x)
    # the oracle: softmax over the live logits, averaged over the choices that fell on live experts
    live = [(t, int(e)) for t in range(30) for e in routing.expert[t] if e >= 4]
    probability = (x @ layer.cohorts[1].key.t()).softmax(dim=-1)
    share = torch.tensor([sum(e == i + 4 for _, e in live) / len(live) for i in range(4)])
    mean = torch.stack([probability[t] for t, _ in live]).mean(dim=0)
    torch.testing.assert_close(routing.losses["balance"], 4 * (share * mean).sum())
    layer.freeze()
    assert layer(x)[1].losses["balance"] == 0


@pytest.mark.parametrize("router", [Switch, TopK])
def test_old_scores_keep_their_bits_and_subsets_their_ids(router):
    layer = MoE(24, 3, 8, router).eval()
    x = torch.randn(50, 24)
    before = layer(x)[1].scores
    for size in (5, 2, 7):
        layer.grow(size)
        assert torch.equal(layer(x)[1].scores[:, :3], before)
    _, routing = layer(x, cohorts=[2, 1])
    assert set(routing.expert.flatten().tolist()) <= set(range(3, 10))
    assert routing.num_experts == 17
    assert (routing.scores[:, :3] == float("-inf")).all()
    assert (routing.scores[:, 10:] == float("-inf")).all()
    routing = layer(x, cohorts=[0])[1]
    assert torch.equal(routing.scores[:, :3], before)


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: Switch(4, rounding="up"), "router.rounding"),
        (lambda: Switch(4, jitter=1.0), "router.jitter"),
        (lambda: Switch(4, capacity_factor=0), "router.capacity_factor"),
        (lambda: Switch(4, eval_capacity_factor=-1), "router.eval_capacity_factor"),
        (lambda: Switch(4, min_capacity=-1), "router.min_capacity"),
        (lambda: TopK(4, balance=-1), "router.balance"),
        (lambda: TopK(4, z_loss=-1), "router.z_loss"),
        (lambda: TopK(4, normalize="none"), "router.normalize"),
        (lambda: MoE(4, 8, 4, lambda dim: TopK(dim, 9)), "router.k"),
        (lambda: MoE(4, 8, 4, lambda dim: TopK(dim, 0)), "router.k"),
    ],
)
def test_wrong_options_name_their_key(make, key):
    with pytest.raises(InputError) as error:
        make()
    assert error.value.key == key
