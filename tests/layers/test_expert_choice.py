import pytest
import torch

from cl_moe.errors import InputError
from cl_moe.layers import ExpertChoice, GShard, MoE, Switch, TopK, fold_load


def test_as_many_places_as_experts_is_all_to_all():
    layer = MoE(8, 3, 8, lambda dim: ExpertChoice(dim, capacity_factor=3.0))
    x, c = torch.randn(2, 5, 8), layer.cohorts[0]
    hidden = torch.relu(torch.einsum("gsd,edh->gseh", x, c.w_in) + c.b_in)
    values = torch.einsum("gseh,ehd->gsed", hidden, c.w_out) + c.b_out
    gates = (x @ c.key.t()).softmax(dim=-1)
    out, routing = layer(x)
    torch.testing.assert_close(out, torch.einsum("gse,gsed->gsd", gates, values))
    assert routing.kept.all()


def test_every_expert_has_the_same_load_in_every_sequence():
    layer = MoE(8, 4, 8, lambda dim: ExpertChoice(dim, capacity_factor=1.0))
    mask = torch.arange(8) < torch.tensor([[8], [5], [0]])
    load = fold_load(layer(torch.randn(3, 8, 8), mask)[1])
    assert load.count.tolist() == [2 + 2 + 0] * 4  # ceil(8 / 4) + ceil(5 / 4)
    assert load.kept == load.count.sum()


def test_ties_go_to_the_earlier_token():
    layer = MoE(4, 2, 4, lambda dim: ExpertChoice(dim, capacity_factor=1.0))
    _, routing = layer(torch.ones(1, 6, 4))
    assert routing.token.tolist() == [0, 1, 2] * 2


def test_a_subset_of_cohorts_chooses_alone_and_old_scores_keep_their_bits():
    layer = MoE(8, 4, 8, ExpertChoice)
    x = torch.randn(3, 6, 8)
    before, old = layer(x)
    layer.grow(3)
    layer.freeze([0])
    after, routing = layer(x, cohorts=[0])
    assert torch.equal(after, before)
    assert torch.equal(layer(x)[1].scores[:, :4], old.scores)
    assert set(routing.expert.tolist()) == {0, 1, 2, 3}
    assert set(layer(x, cohorts=[1])[1].expert.tolist()) == {4, 5, 6}
    assert routing.num_experts == 7


def test_a_sequence_does_not_depend_on_its_batch():
    layer = MoE(8, 4, 8, ExpertChoice)
    x = torch.randn(5, 12, 8)
    out, _ = layer(x)
    torch.testing.assert_close(layer(x[2:3])[0][0], out[2])


def test_who_is_causal_says_so_and_it_is_true():
    """A token's output must not move with a later token, unless the layer says that it may."""
    torch.manual_seed(0)
    routers = {
        Switch: True,
        TopK: True,
        lambda dim: GShard(dim, second="none"): True,
        GShard: False,
        ExpertChoice: False,
    }
    for router, causal in routers.items():
        layer = MoE(8, 4, 8, router).eval()
        assert layer.causal is causal
        moved = 0.0
        for _ in range(20):
            x = torch.randn(1, 12, 8)
            other = torch.cat([x[:, :6], torch.randn(1, 6, 8) + 2], dim=1)
            moved = max(moved, (layer(x)[0] - layer(other)[0])[:, :6].abs().max().item())
        assert (moved < 1e-6) == causal
    assert MoE(8, 4, 8, lambda dim: ExpertChoice(dim, allow_noncausal=True)).causal
    assert MoE(8, 4, 8, lambda dim: GShard(dim, allow_noncausal=True)).causal


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: MoE(4, 2, 4, lambda dim: ExpertChoice(dim, 3.0)), "router.capacity_factor"),
        (lambda: ExpertChoice(4, 0), "router.capacity_factor"),
        (lambda: ExpertChoice(4, float("nan")), "router.capacity_factor"),
        (lambda: ExpertChoice(4, rounding="up"), "router.rounding"),
        (lambda: ExpertChoice(4, z_loss=-1), "router.z_loss"),
    ],
)
def test_wrong_options_name_their_key(make, key):
    with pytest.raises(InputError) as error:
        make()
    assert error.value.key == key


def test_a_subset_too_small_for_the_capacity_is_refused():
    layer = MoE(4, 2, 4, ExpertChoice)
    layer.grow(1)
    with pytest.raises(InputError, match="at most 1"):
        layer(torch.randn(2, 3, 4), cohorts=[1])
