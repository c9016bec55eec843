"""The one function that changes a model, and the ledger that says what it did."""

import io
import json

import pytest
import torch

from cl_moe.errors import InputError
from cl_moe.growth import (
    AllPast,
    At,
    EveryExperience,
    NeverFreeze,
    NeverGrow,
    PastExperts,
    PastExpertsAndRouter,
)
from cl_moe.growth.adapt import adapt, add_classes, births, replay, take_census
from cl_moe.growth.checks import check_growth

POLICIES = [NeverFreeze, PastExperts, PastExpertsAndRouter, AllPast]
NEWBORNS = {"moe": 2, "switch": 3, "peer": 4}


def test_a_boundary_freezes_then_adds_classes_then_grows(new_model, grow) -> None:
    model = new_model("peer", num_blocks=2)
    ledger = grow(model, EveryExperience(4, init="copy", noise=0.05), PastExpertsAndRouter(), through=1)
    assert ledger == [
        {"experience": 0, "act": "head", "classes": [0, 1]},
        {"experience": 1, "act": "freeze", "layer": 0, "cohorts": [0], "shared": True},
        {"experience": 1, "act": "freeze", "layer": 1, "cohorts": [0], "shared": True},
        {"experience": 1, "act": "head", "classes": [2, 3]},
        {"experience": 1, "act": "grow", "layer": 0, "num_experts": 4, "init": "copy", "noise": 0.05},
        {"experience": 1, "act": "grow", "layer": 1, "num_experts": 4, "init": "copy", "noise": 0.05},
    ]
    for layer in model.expert_layers.values():
        assert layer.cohort_sizes == (16, 4)
        assert layer.frozen_cohorts == (True, False)
        assert not any(p.requires_grad for part in layer.shared_router for p in part.parameters())
        assert births(ledger, 0) == [0, 1]


def test_a_frozen_cohort_is_not_frozen_again(new_model, grow) -> None:
    ledger = grow(new_model("moe"), EveryExperience(2), PastExperts(), through=3)
    assert [event["cohorts"] for event in ledger if event["act"] == "freeze"] == [[0], [1], [2]]


def test_the_head_grows_by_cohorts_of_new_classes_only(new_model) -> None:
    model = new_model("dense")
    add_classes(model, [(4, 1), (2,)], seed=0)
    events = adapt(model, take_census(model, 1, [], {}), NeverGrow(), NeverFreeze(), (1, 7, 2, 5), seed=0)
    assert events == [{"experience": 1, "act": "head", "classes": [7, 5]}]
    assert model.head.classes == [4, 1, 2, 7, 5]
    assert [rows.out_features for rows in model.head.cohorts] == [2, 1, 2]


@pytest.mark.parametrize("layer", ["moe", "switch", "peer"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("init", ["fresh", "copy", "zero_output"])
def test_replaying_the_ledger_rebuilds_the_shape(new_model, grow, layer, policy, init) -> None:
    grown = new_model(layer, seed=0, num_blocks=2)
    ledger = grow(grown, EveryExperience(NEWBORNS[layer], init=init), policy(), through=3)
    fresh = new_model(layer, seed=1, num_blocks=2)
    replay(fresh, json.loads(json.dumps(ledger)))
    assert shape(fresh) == shape(grown)
    assert fresh.head.classes == grown.head.classes == list(range(8))
    fresh.load_state_dict(grown.state_dict(), strict=True)
    inputs = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    for model in (fresh, grown):
        model.train()  # statistics that were stopped must have stopped in both
        model(inputs)
        model.eval()
    assert torch.equal(fresh(inputs)[0], grown(inputs)[0])


def shape(model: torch.nn.Module) -> dict[str, object]:
    """Names, shapes and learning of the whole state, and what has stopped besides."""
    learning = {name: p.requires_grad for name, p in model.named_parameters()}
    tensors = {name: (tuple(v.shape), v.dtype, learning.get(name)) for name, v in model.state_dict().items()}
    stopped = {n: m.statistics_frozen for n, m in model.named_modules() if hasattr(m, "statistics_frozen")}
    return tensors | {"stopped": stopped}


def test_a_ledger_survives_json_and_a_plain_checkpoint(new_model, grow) -> None:
    ledger = grow(new_model("moe", num_blocks=2), At({1: 2, 3: 4}), AllPast())
    assert json.loads(json.dumps(ledger)) == ledger
    file = io.BytesIO()
    torch.save(ledger, file)
    file.seek(0)
    assert torch.load(file, weights_only=True) == ledger


@pytest.mark.parametrize("layer", ["moe", "peer"])
@pytest.mark.parametrize("init", ["fresh", "copy"])
def test_newborns_depend_on_seed_experience_and_layer_only(new_model, grow, snapshot, layer, init) -> None:
    def grown(draws: int, seed: int) -> dict[str, bytes]:
        torch.manual_seed(draws)
        torch.rand(draws)
        model = new_model(layer, num_blocks=2)
        torch.rand(draws)
        grow(model, EveryExperience(4, init=init), NeverFreeze(), through=2, seed=seed)
        return snapshot(model)

    first, second, other = grown(1, seed=0), grown(1000, seed=0), grown(1, seed=1)
    assert first == second
    born = [n for n in first if ".cohorts.1." in n or ".cohorts.2." in n or n.startswith("head")]
    assert born
    for name in born:
        assert first[name] != other[name], f"{name} does not depend on the seed"
    for name in (n for n in born if n.startswith("blocks.0.cohorts.1")):
        for twin in (name.replace("blocks.0", "blocks.1"), name.replace("cohorts.1", "cohorts.2")):
            assert first[name] != first[twin], f"{name} and {twin} were drawn alike"


def test_growing_leaves_the_global_generator_alone(new_model, grow) -> None:
    model = new_model("moe")
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    grow(model, EveryExperience(2), PastExperts())
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("layer", ["moe", "switch", "peer"])
@pytest.mark.parametrize("init", ["fresh", "copy", "zero_output"])
def test_growth_leaves_what_existed_byte_for_byte(new_model, grow, snapshot, layer, init) -> None:
    model = new_model(layer, num_blocks=2)
    grow(model, NeverGrow(), NeverFreeze(), through=0)
    parameters, before = dict(model.named_parameters()), snapshot(model)
    ledger = [{"experience": 0, "act": "head", "classes": [0, 1]}]
    census = take_census(model, 1, ledger, {})
    adapt(model, census, EveryExperience(NEWBORNS[layer], init=init), PastExperts(), (2, 3), seed=0)
    after = snapshot(model)
    assert {name: after[name] for name in before} == before
    assert len(after) > len(before)
    now = dict(model.named_parameters())
    assert all(now[name] is parameter for name, parameter in parameters.items()), "an old parameter moved"


def test_copies_follow_the_load_of_their_own_layer(new_model) -> None:
    model = new_model("moe", num_blocks=2)
    loads = {0: torch.tensor([0.0, 9, 1, 5]).double(), 1: torch.tensor([7.0, 0, 8, 1]).double()}
    census = take_census(model, 1, [], loads)
    adapt(model, census, EveryExperience(2, init="copy", noise=0.0), NeverFreeze(), (0,), seed=0)
    for block, used in ((0, [1, 3]), (1, [2, 0])):
        old, newborn = model.blocks[block].cohorts
        for name, parameter in newborn.named_parameters():
            assert torch.equal(parameter, old.get_parameter(name)[used]), name


def test_nothing_left_to_learn_is_an_error(new_model) -> None:
    model = new_model("moe")
    add_classes(model, [(0, 1)], seed=0)
    census = take_census(model, 1, [], {})
    with pytest.raises(InputError) as caught:
        adapt(model, census, NeverGrow(), AllPast(), (0, 1), seed=0)
    assert caught.value.key == "freeze (or growth)"
    assert "experience 1" in caught.value.got


def test_new_classes_alone_are_enough_to_learn(new_model) -> None:
    model = new_model("moe")
    add_classes(model, [(0, 1)], seed=0)
    adapt(model, take_census(model, 1, [], {}), NeverGrow(), AllPast(), (2,), seed=0)
    learning = [name for name, p in model.named_parameters() if p.requires_grad]
    assert learning == ["head.cohorts.1.weight", "head.cohorts.1.bias"]


def test_a_dense_model_does_not_grow(new_model) -> None:
    model = new_model("dense")
    with pytest.raises(InputError) as caught:
        check_growth(model, EveryExperience(2), 3)
    assert caught.value.key == "layer"
    check_growth(model, NeverGrow(), 3)


def test_a_size_that_a_layer_cannot_take_is_refused_before_training(new_model) -> None:
    model = new_model("peer")
    for wrong in (At({1: 3}), At({1: 10_000}, init="copy")):
        with pytest.raises(InputError) as caught:
            check_growth(model, wrong, 3)
        assert caught.value.key == "growth.num_experts"
    check_growth(model, At({1: 10_000}, init="fresh"), 3)


def test_an_unknown_act_in_a_ledger_is_an_error(new_model) -> None:
    with pytest.raises(ValueError, match="explode"):
        replay(new_model("moe"), [{"experience": 1, "act": "explode", "layer": 0}])


def test_the_census_says_sizes_ages_and_loads(new_model, grow) -> None:
    model = new_model("moe")
    ledger = grow(model, At({1: 2, 3: 1}), PastExperts())
    load = torch.arange(7).double()
    census = take_census(model, 4, ledger, {0: load}, [0.5, 0.25])
    layer = census.layers[0]
    assert (layer.sizes, layer.births, layer.frozen) == ((4, 2, 1), (0, 1, 3), (True, True, False))
    assert layer.load is load
    assert (census.experience, census.scores) == (4, (0.5, 0.25))
