import copy

import pytest
import torch

from cl_moe.layers import PEER, DenseFFN, ExpertLoad, MoE, Routing, fold_load


def test_loads_are_counted_one_pair_after_the_other():
    torch.manual_seed(0)
    expert, weight = torch.randint(5, (20, 3)), torch.rand(20, 3)
    kept, valid = torch.rand(20, 3) > 0.3, torch.rand(20) > 0.2
    kept = kept & valid[:, None]
    load = fold_load(Routing(expert, weight, kept, 20, 6, valid=valid))
    score, count = [0.0] * 6, [0] * 6
    for t in range(20):
        for k in range(3):
            if valid[t]:
                count[int(expert[t, k])] += 1
                score[int(expert[t, k])] += float(weight[t, k]) * bool(kept[t, k])
    assert load.count.tolist() == count
    assert int(load.kept) == int(kept.sum())
    torch.testing.assert_close(load.score, torch.tensor(score, dtype=torch.float64))


def test_a_flat_routing_has_the_same_load():
    expert, weight = torch.randint(5, (20, 3)), torch.rand(20, 3)
    regular = Routing(expert, weight, torch.ones(20, 3, dtype=torch.bool), 20, 5, valid=torch.rand(20) > 0.2)
    token, flat_expert, flat_weight, flat_kept = regular.pairs()
    flat = regular._replace(expert=flat_expert, weight=flat_weight, kept=flat_kept, token=token)
    for a, b in zip(fold_load(regular), fold_load(flat), strict=True):
        assert torch.equal(a, b)


def test_loads_of_batches_add_up_to_the_load_of_all_across_a_growth():
    layer = PEER(8, 16, heads=2, k=2).eval()
    x = torch.randn(30, 8)
    small = fold_load(layer(x[:10])[1])
    layer.grow(9)
    parts = [small, *(fold_load(layer(part)[1]) for part in x[10:].split(10))]
    total = parts[0].merge(parts[1]).merge(parts[2])
    assert total.count.sum() == 30 * 4
    assert total.count.shape == (25,)
    rest = fold_load(layer(x[10:])[1])
    assert torch.equal(total.count, small.padded(25).count + rest.count)
    assert torch.equal(parts[1].merge(small).count, small.merge(parts[1]).count)
    assert isinstance(total, ExpertLoad)


def test_gradients_do_not_leak_into_loads():
    _, routing = MoE(8, 4, 8)(torch.randn(3, 8))
    assert not fold_load(routing).score.requires_grad


@pytest.mark.parametrize("hidden", [None, 16])
def test_dense_routes_nothing_and_masks_padding(hidden):
    layer = DenseFFN(8, hidden)
    x, mask = torch.randn(2, 5, 8), torch.rand(2, 5) > 0.5
    out, routing = layer(x, mask)
    expected = layer.linear_in(x)
    if hidden is not None:
        expected = layer.linear_out(torch.relu(expected))
    torch.testing.assert_close(out, expected * mask[..., None])
    assert routing.expert.shape == (10, 0)
    assert routing.num_experts == layer.num_experts == 0
    assert fold_load(routing).count.shape == (0,)
    assert layer.frozen_cohorts == ()
    layer.freeze()
    assert all(p.requires_grad for p in layer.parameters())
    assert torch.equal(layer(x, mask, cohorts=[0])[0], out), "a dense layer is of every cohort's age"


@pytest.mark.parametrize(
    "make", [lambda: MoE(8, 4, 8), lambda: PEER(8, 16, heads=2, k=2), lambda: DenseFFN(8)]
)
def test_any_leading_shape_and_no_tokens_at_all(make):
    layer = make().eval()
    x = torch.randn(2, 3, 4, 8)
    flat, _ = layer(x.reshape(-1, 8))
    out, routing = layer(x)
    torch.testing.assert_close(out, flat.reshape(x.shape))
    assert routing.num_tokens == 24
    assert layer(x[0, 0, 0])[0].shape == (8,)
    assert layer(torch.empty(0, 8))[0].shape == (0, 8)
    everything_padded = layer(x, mask=torch.zeros(2, 3, 4, dtype=torch.bool))[0]
    assert (everything_padded == 0).all()
    assert torch.equal(copy.deepcopy(layer)(x)[0], out)
