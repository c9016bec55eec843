"""Newborns of another hidden width: asked by the schedule, told by the ledger, rebuilt by a replay."""

from __future__ import annotations

import pytest

from cl_moe.errors import InputError
from cl_moe.growth import At, EveryExperience, PastExperts
from cl_moe.growth.adapt import replay
from cl_moe.growth.checks import check_growth


@pytest.mark.parametrize(
    "schedule", [EveryExperience(2, "fresh", hidden=12), At({1: 2, 3: 1}, "fresh", hidden=12)]
)
def test_a_replayed_ledger_gives_the_same_widths_and_bytes(schedule, new_model, grow, snapshot) -> None:
    model = new_model("moe")
    ledger = grow(model, schedule, PastExperts())
    births = [event for event in ledger if event["act"] == "grow"]
    assert births
    assert all(event["hidden"] == 12 for event in births)
    widths = [cohort.hidden for cohort in model.expert_layers[0].cohorts]
    assert widths == [8] + [12] * len(births)
    again = new_model("moe", seed=1)
    replay(again, ledger)
    again.load_state_dict(model.state_dict())
    assert snapshot(again) == snapshot(model)
    assert again.expert_layers[0].frozen_cohorts == model.expert_layers[0].frozen_cohorts


def test_a_ledger_without_a_width_is_as_it_was(new_model, grow) -> None:
    ledger = grow(new_model("moe"), EveryExperience(2), PastExperts(), through=1)
    assert not [event for event in ledger if "hidden" in event]


@pytest.mark.parametrize(
    ("layer", "schedule"),
    [("peer", EveryExperience(4, "fresh", hidden=12)), ("moe", EveryExperience(2, "copy", hidden=12))],
)
def test_a_width_that_cannot_be_is_refused_before_training(layer, schedule, new_model) -> None:
    with pytest.raises(InputError) as error:
        check_growth(new_model(layer), schedule, 3)
    assert error.value.key == "growth.hidden"
    check_growth(new_model("moe"), EveryExperience(2, "copy", hidden=8), 3)


@pytest.mark.parametrize("hidden", [0, -1, 1.5, True, "8"])
def test_a_width_is_a_whole_number(hidden) -> None:
    for make in (lambda: EveryExperience(2, hidden=hidden), lambda: At({1: 2}, hidden=hidden)):
        with pytest.raises(InputError) as error:
            make()
        assert error.value.key == "growth.hidden"
