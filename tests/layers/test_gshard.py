import pytest
import torch

from cl_moe.errors import InputError
from cl_moe.layers import Candidates, Capacity, GShard, MoE, Switch, Tokens, fold_load

WIDE = Capacity(100.0, 100.0, 0)


def routed(router, logits):
    """The routing of one sequence whose logits are given: keys that pick them out of the tokens."""
    num = logits.shape[1]
    keys = Candidates([torch.eye(num)], torch.arange(num), torch.ones(num, dtype=torch.bool), num)
    return router(Tokens(logits, None, logits.shape[0]), keys)


def test_first_choices_take_slots_before_any_second_one():
    logits = torch.tensor([[2.0, 1.0, 0.0], [2.0, 0.0, 1.0], [1.0, 2.0, 0.0], [1.0, 0.0, 2.0]])
    routing = routed(GShard(3, "all", capacity=Capacity(1e-9, 1e-9, 2)), logits)
    # expert 0: the first choices of tokens 0 and 1 fill it, so the seconds of 2 and 3 are dropped
    assert routing.expert.tolist() == [[0, 1], [0, 2], [1, 0], [2, 0]]
    assert routing.kept.tolist() == [[True, True], [True, True], [True, False], [True, False]]
    torch.testing.assert_close(routing.weight[2:, 0], logits[2:, :2].softmax(-1).amax(-1))  # not renormalised


def test_a_second_expert_is_asked_as_often_as_its_gate_says():
    torch.manual_seed(0)
    logits = torch.tensor([[0.0, -2.5]]).repeat(20_000, 1)
    second = logits[0].softmax(-1)[1].item()
    asked = routed(GShard(2, capacity=WIDE), logits).asked[:, 1]
    expected, tolerance = second / 0.2, 5 * (second / 0.2 * (1 - second / 0.2) / 20_000) ** 0.5
    assert 0 < expected < 1
    assert abs(asked.double().mean().item() - expected) < tolerance
    likely = torch.tensor([[0.0, -0.1]]).repeat(1000, 1)
    assert routed(GShard(2, capacity=WIDE), likely).asked.all(), "a gate over the threshold is certain"


def test_sampling_is_seeded_and_stops_in_evaluation():
    logits = torch.tensor([[0.0, -2.5]]).repeat(100, 1)
    router = GShard(2, capacity=WIDE)
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(routed(router, logits).asked)
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert routed(router.eval(), logits).asked.all()


def test_what_is_not_asked_is_no_load_no_drop_and_takes_no_slot():
    logits = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    none = routed(GShard(2, "none", capacity=WIDE), logits)
    load = fold_load(none)
    assert load.count.tolist() == [2, 1]
    assert load.kept == load.count.sum()
    torch.testing.assert_close(none.weight[:, 0], torch.sigmoid(torch.ones(3)))
    full = Capacity(1e-9, 1e-9, 1)
    load = fold_load(routed(GShard(2, "threshold", 0.4, capacity=full), logits))
    assert (load.count.tolist(), int(load.kept)) == ([2, 1], 2)


def test_the_capacity_is_that_of_switch():
    torch.manual_seed(0)
    tokens, keys = Tokens(torch.randn(24, 4), torch.rand(24) > 0.2, 8), torch.randn(3, 4)
    candidates = Candidates([keys], torch.arange(3), torch.ones(3, dtype=torch.bool), 3)
    for rounding in ("ceil", "floor"):
        switch = Switch(4, capacity_factor=0.7, min_capacity=1, rounding=rounding, jitter=0)
        gshard = GShard(4, "none", capacity=Capacity(0.7, 0.7, 1, rounding))
        ours, theirs = gshard(tokens, candidates), switch(tokens, candidates)
        assert torch.equal(ours.kept[:, :1], theirs.kept)
        assert not ours.kept[:, 1].any()


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: GShard(4, "some"), "router.second"),
        (lambda: GShard(4, threshold=0), "router.threshold"),
        (lambda: GShard(4, balance=-1), "router.balance"),
        (lambda: MoE(4, 1, 4, GShard), "layer.num_experts (or router)"),
        (lambda: Capacity(factor=0), "router.capacity.factor"),
        (lambda: Capacity(eval_factor=float("inf")), "router.capacity.eval_factor"),
        (lambda: Capacity(min_slots=-1), "router.capacity.min_slots"),
        (lambda: Capacity(rounding="up"), "router.capacity.rounding"),
    ],
)
def test_wrong_options_name_their_key(make, key):
    with pytest.raises(InputError) as error:
        make()
    assert error.value.key == key
