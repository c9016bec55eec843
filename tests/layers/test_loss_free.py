"""Auxiliary-loss-free balancing: biases that choose, and move after a step."""

import copy

import pytest
import torch

from cl_moe.errors import InputError
from cl_moe.layers import MoE, Scores, StepLoads, TopK, fold_load

RATE = 0.01


def build(function="sigmoid", rate=RATE):
    torch.manual_seed(0)
    return MoE(8, 4, 8, lambda dim: TopK(dim, 2, balance=0, scores=Scores(function, rate)))


def test_the_bias_chooses_and_stays_out_of_the_gates():
    layer, x = build(), torch.randn(30, 8)
    with torch.no_grad():
        layer.cohorts[0].selection_bias[3] = 10.0
    _, routing = layer(x)
    assert (routing.expert[:, 0] == 3).all()
    score = routing.scores.sigmoid().gather(1, routing.expert)
    torch.testing.assert_close(routing.weight, score / score.sum(1, keepdim=True))


def test_forward_leaves_it_alone_and_a_step_moves_it_against_the_load():
    layer = build()
    _, routing = layer(torch.randn(30, 8))
    assert (layer.cohorts[0].selection_bias == 0).all()
    count = fold_load(routing).count
    layer.after_step(count)
    expected = [RATE * ((c < 15) - (c > 15)) for c in count.tolist()]  # 60 choices of 4 experts
    torch.testing.assert_close(layer.cohorts[0].selection_bias, torch.tensor(expected))
    assert len({round(v, 6) for v in expected}) > 1


def test_steps_even_out_the_load():
    layer, x = build(), torch.randn(200, 8) + 1.0

    def spread():
        return fold_load(layer(x)[1]).count.double().std(unbiased=False).item()

    before = spread()
    for _ in range(150):
        layer.after_step(fold_load(layer(x)[1]).count)
    assert before > 20
    assert spread() < before / 4


def test_batches_of_a_step_may_be_added_up_and_nothing_routed_moves_nothing():
    one, two = build(), build()
    x = torch.randn(40, 8)
    parts = [fold_load(one(part)[1]).count for part in x.split(10)]
    one.after_step(sum(parts))
    two.after_step(fold_load(two(x)[1]).count)
    assert torch.equal(one.cohorts[0].selection_bias, two.cohorts[0].selection_bias)
    one.after_step(torch.zeros(4))
    assert torch.equal(one.cohorts[0].selection_bias, two.cohorts[0].selection_bias)


def test_a_frozen_cohort_keeps_its_bytes_and_the_rest_balance_among_themselves():
    layer = build()
    layer.after_step(torch.tensor([9, 1, 1, 1]))
    layer.grow(2)
    assert (layer.cohorts[1].selection_bias == 0).all()
    layer.freeze([0])
    frozen = layer.cohorts[0].selection_bias.clone()
    layer.after_step(torch.tensor([0, 0, 0, 0, 5, 3]))
    assert torch.equal(layer.cohorts[0].selection_bias, frozen)
    torch.testing.assert_close(layer.cohorts[1].selection_bias, torch.tensor([-RATE, RATE]))
    assert layer.cohorts[0].statistics_frozen
    layer.freeze()
    layer.after_step(torch.ones(6))
    assert torch.equal(layer.cohorts[0].selection_bias, frozen)


def test_copies_are_chosen_like_their_originals_and_the_state_comes_back():
    layer = build()
    layer.after_step(torch.tensor([9, 1, 1, 1]))
    layer.grow(4, "copy", noise=0.0, load=torch.tensor([4.0, 3.0, 2.0, 1.0]))
    assert torch.equal(layer.cohorts[1].selection_bias, layer.cohorts[0].selection_bias)
    again = build()
    again.grow(4)
    again.load_state_dict(copy.deepcopy(layer.state_dict()))
    x = torch.randn(9, 8)
    assert torch.equal(again(x)[0], layer(x)[0])
    assert torch.equal(layer(x, cohorts=[0])[1].expert, layer(x, cohorts=[1])[1].expert - 4)


def test_who_needs_no_load_has_no_bias():
    layer = MoE(8, 4, 8)
    assert not layer.wants_load
    assert build().wants_load
    assert not any("bias" in name for name in layer.state_dict())
    layer.after_step(torch.ones(4))
    with pytest.raises(InputError, match="shape"):
        build().after_step(torch.ones(3))


@pytest.mark.parametrize(
    ("options", "key"),
    [(("tanh", 0), "router.scores.function"), (("softmax", -1), "router.scores.bias_rate")],
)
def test_wrong_options_name_their_key(options, key):
    with pytest.raises(InputError) as error:
        Scores(*options)
    assert error.value.key == key


def test_the_loads_of_a_step_are_handed_over_once():
    layers = {0: build(), 2: MoE(8, 4, 8)}
    x, loads = torch.randn(40, 8), StepLoads()
    for part in x.split(10):
        loads.add(layers, {index: layer(part)[1] for index, layer in layers.items()})
    loads.apply(layers)
    at_once = build()
    at_once.after_step(fold_load(at_once(x)[1]).count)
    bias = layers[0].cohorts[0].selection_bias
    assert bias.abs().sum() > 0
    assert torch.equal(bias, at_once.cohorts[0].selection_bias)
    before = bias.clone()
    loads.apply(layers)  # a step that routed nothing here, as on a rank without such tokens
    assert torch.equal(bias, before)
