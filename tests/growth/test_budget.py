"""Growth within bounds: sizes without growing, cohorts that are not born, runs that are refused."""

from __future__ import annotations

import pytest
import torch

from cl_moe.errors import InputError
from cl_moe.growth import EveryExperience, GrowthBudget, NeverFreeze, OnDrift
from cl_moe.growth.adapt import adapt, replay, take_census
from cl_moe.growth.budget import Size, sizes_after
from cl_moe.growth.checks import check_growth


def measured(model: torch.nn.Module) -> Size:
    parameters = list(model.parameters())
    experts = sum(layer.num_experts for layer in model.expert_layers.values())
    weights = sum(p.numel() * p.element_size() for p in parameters)
    return Size(experts, sum(p.numel() for p in parameters), weights)


@pytest.mark.parametrize(
    ("layer", "births"), [("moe", [2, 3]), ("switch", [1]), ("peer", [4, 9]), ("pkm", [16])]
)
def test_the_size_of_what_was_not_born_is_that_of_what_is(layer, births, new_model) -> None:
    model = new_model(layer, num_blocks=2)
    state = torch.get_rng_state()
    told = sizes_after(model, births)
    assert torch.equal(torch.get_rng_state(), state)
    assert told[0] == measured(model)
    for born, size in zip(births, told[1:], strict=True):
        for part in model.expert_layers.values():
            part.grow(born)
        assert measured(model) == size


def test_newborns_of_another_width_have_another_size(new_model) -> None:
    model = new_model("moe")
    told = sizes_after(model, [2], hidden=5)[1]
    model.expert_layers[0].grow(2, hidden=5)
    assert measured(model) == told


@pytest.mark.parametrize("bound", ["experts", "parameters", "bytes"])
def test_what_does_not_fit_is_not_born_and_the_ledger_says_why(bound, new_model, grow) -> None:
    room = getattr(sizes_after(new_model("moe"), [2, 2], new_classes=6)[-1], bound)  # two per experience
    schedule = EveryExperience(2, budget=GrowthBudget(**{bound: room}))
    ledger = grow(new_model("moe"), schedule, NeverFreeze(), through=4)
    assert [event["experience"] for event in ledger if event["act"] == "grow"] == [1, 2]
    notes = [event for event in ledger if event["act"] == "decide"]
    assert notes == [
        {"experience": at, "act": "decide", "wanted": 2, "born": 0, "over_budget": bound} for at in (3, 4)
    ]
    again = new_model("moe", seed=1)
    replay(again, ledger)
    assert again.expert_layers[0].cohort_sizes == (4, 2, 2)


def test_a_plan_over_its_budget_is_refused_before_training(new_model) -> None:
    schedule = EveryExperience(2, budget=GrowthBudget(experts=7, on_exceed="refuse"))
    check_growth(new_model("moe"), schedule, 2)
    with pytest.raises(InputError) as caught:
        check_growth(new_model("moe"), schedule, 3)
    assert caught.value.key == "growth.budget.experts (or growth)"
    assert "before experience 2" in caught.value.got
    check_growth(new_model("moe"), EveryExperience(2, budget=GrowthBudget(experts=7)), 3)
    with pytest.raises(InputError):
        check_growth(new_model("moe"), EveryExperience(2, budget=GrowthBudget(experts=3)), 3)


def test_rows_of_the_head_count_before_training(new_model) -> None:
    room = sizes_after(new_model("moe"), [2, 2], new_classes=6)[-1].parameters  # at experience 2 of 3
    for bound, fits in ((room, True), (room - 1, False)):
        schedule = EveryExperience(2, budget=GrowthBudget(parameters=bound, on_exceed="refuse"))
        check_growth(new_model("moe"), schedule, 3)  # without a word of classes there is room
        if fits:
            check_growth(new_model("moe"), schedule, 3, classes=(2, 4, 6))
            continue
        with pytest.raises(InputError, match=r"before experience 2"):
            check_growth(new_model("moe"), schedule, 3, classes=(2, 4, 6))


def test_a_start_that_is_too_large_is_told_as_such(new_model) -> None:
    """Where growth ends at a budget, too, a model that begins above it is refused; to stop is no advice."""
    with pytest.raises(InputError) as caught:
        check_growth(new_model("moe"), OnDrift(2, budget=GrowthBudget(experts=1)), 3)
    assert "at its start" in caught.value.got
    assert "on_exceed" not in caught.value.allowed


def test_what_the_data_decide_is_refused_when_it_comes(new_model) -> None:
    model, budget = new_model("moe"), GrowthBudget(experts=5, on_exceed="refuse")
    schedule = OnDrift(2, budget=budget)
    check_growth(model, schedule, 9)
    losses = torch.linspace(0, 1, 32)
    quiet = take_census(model, 1, [], {}, coming=losses)
    adapt(model, quiet, schedule, NeverFreeze(), (0, 1), seed=0)
    loud = type(quiet)(2, quiet.layers, reference=losses, coming=losses + 1)
    with pytest.raises(InputError) as caught:
        adapt(model, loud, schedule, NeverFreeze(), (2,), seed=0)
    assert caught.value.got == "growth to 6 experts before experience 2"


def test_shells_are_planned_as_far_as_the_budget_goes(new_model) -> None:
    from functools import partial

    from cl_moe.layers import PEER
    from cl_moe.layers.retrieval import Retrieval
    from cl_moe.models import MLPClassifier

    layer = partial(PEER, num_experts=16, heads=2, k=4, key_dim=8, retrieval=Retrieval(grow_by="shell"))
    model = MLPClassifier((6,), 6, layer, width=16, num_blocks=1, slots="all")
    with pytest.raises(InputError, match="in place by shells"):
        check_growth(model, OnDrift(9, init="fresh"), 3)


@pytest.mark.parametrize(
    "options", [{"experts": 0}, {"bytes": 1.5}, {"parameters": True}, {"on_exceed": "cut"}]
)
def test_bounds_are_whole_numbers(options) -> None:
    with pytest.raises(InputError) as caught:
        GrowthBudget(**options)
    assert caught.value.key == f"growth.budget.{next(iter(options))}"
