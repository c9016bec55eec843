"""The opposite of growth: who ends, what of a layer changes then, and what the laws forbid."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from torch import Tensor

from cl_moe.errors import InputError
from cl_moe.growth import (
    Aged,
    Census,
    LayerCensus,
    NeverFreeze,
    NeverGrow,
    NeverPrune,
    PastExperts,
    PruneIdle,
    RecycleDead,
)
from cl_moe.growth.adapt import adapt, replay, take_census
from cl_moe.growth.checks import check_prune
from cl_moe.growth.pruning import Removal
from cl_moe.layers import MoE, TopK
from cl_moe.layers.expert_layer import ExpertLayer
from cl_moe.models import MLPClassifier
from cl_moe.seeds import seeded

X = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))


def layer_of(peak: list[float], lives: list[float], frozen: tuple[bool, ...] = (False, False)) -> LayerCensus:
    both = (torch.tensor(values, dtype=torch.float64) for values in (peak, lives))
    return LayerCensus((2, 2), (0, 1), frozen, peak=next(both), lives=next(both))


@pytest.mark.parametrize(
    ("layer", "experts"),
    [
        (layer_of([2.0, 0.05, 1.0, 0.0], [3, 3, 2, 2]), (1, 3)),
        (layer_of([2.0, 0.05, 1.0, 0.0], [3, 3, 2, 1]), (1,)),  # too young to tell
        (layer_of([2.0, 0.05, 1.0, 0.0], [3, 3, 2, 2], (True, False)), (3,)),  # frozen is frozen
        (layer_of([2.0, 0.5, 1.0, 0.1], [3, 3, 2, 2]), ()),
        (LayerCensus((4,), (0,), (False,)), ()),  # nothing was trained
    ],
)
def test_the_dead_of_live_cohorts_start_anew(layer: LayerCensus, experts: tuple[int, ...]) -> None:
    removal = RecycleDead(threshold=0.1, patience=2).decide(Census(3, {0: layer}))
    assert removal == Removal(experts={0: experts} if experts else {})


@pytest.mark.parametrize(
    ("shares", "frozen", "cohorts"),
    [
        ([(1.0,), (0.99, 0.01), (0.99, 0.01)], (True, False, False), (1,)),
        ([(1.0,), (0.99, 0.01), (0.99, 0.01)], (False, True, False), (1,)),  # frozen ones too
        ([(1.0,), (0.99, 0.01), (0.5, 0.5)], (True, False, False), ()),
        ([(1.0,), (0.9, 0.1), (0.99, 0.01)], (True, False, False), ()),  # it was needed once
        ([(1.0,), (0.99, 0.01)], (True, False, False), ()),  # too young
        ([(1.0,), (0.99, 0.01), (0.99, 0.01)], (True, False, True), ()),  # the last that learns
    ],
)
def test_idle_cohorts_are_candidates_no_more(shares, frozen, cohorts) -> None:
    layer = LayerCensus((4, 4, 4), (0, 1, 3), frozen, shares=tuple(shares))
    removal = PruneIdle(threshold=0.05, patience=2).decide(Census(3, {0: layer}))
    assert removal == Removal(cohorts={0: cohorts} if cohorts else {})


@pytest.mark.parametrize("init", ["fresh", "copy", "zero_output"])
def test_recycling_changes_the_rows_of_these_experts_alone(init: str, new_model) -> None:
    model = new_model("moe")
    layer = model.expert_layers[0]
    layer.grow(3)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    kept = [id(parameter) for parameter in layer.parameters()]
    torch.manual_seed(0)
    layer.recycle([1, 5], init=init, load=torch.arange(7).double())
    assert [id(parameter) for parameter in layer.parameters()] == kept, "an optimizer holds them"
    for name, value in layer.state_dict().items():
        row = {"0": 1, "1": 1}[name.split(".")[1]]
        changed = (value != before[name]).flatten(1).any(dim=1)
        assert changed[row]
        assert changed.sum() == 1, name
    if init == "zero_output":
        assert not layer.cohorts[1].w_out[1].any()


@pytest.mark.parametrize("experts", [[0], [3, 4], [9], [-1]])
def test_what_is_frozen_or_not_there_is_not_recycled(experts: list[int], new_model) -> None:
    layer = new_model("moe").expert_layers[0]
    layer.grow(2)
    layer.freeze([0])
    with pytest.raises(InputError) as caught:
        layer.recycle(experts)
    assert caught.value.key == "experts"


def answer(layer: ExpertLayer, **options: object) -> tuple[Tensor, set[int]]:
    out, routing = layer.eval()(X, **options)
    return out, set(routing.expert.flatten().tolist())


@pytest.mark.parametrize(("name", "born"), [("moe", 3), ("switch", 3), ("peer", 16), ("pkm", 16)])
def test_a_pruned_cohort_is_chosen_by_nobody_unless_asked_for(
    name: str, born: int, new_model, snapshot
) -> None:
    model = new_model(name)
    layer = model.expert_layers[0]
    first = layer.num_experts
    layer.grow(born)
    before, everyone, (alone, ids) = (
        snapshot(model),
        answer(layer, cohorts=[0, 1])[0],
        answer(layer, cohorts=[1]),
    )
    layer.prune([0])
    out, chosen = answer(layer)
    assert snapshot(model) == before
    assert layer.frozen_cohorts == (True, False)
    assert torch.equal(out, alone)
    assert chosen == ids
    assert min(chosen) >= first, "ids are for life"
    assert torch.equal(answer(layer, cohorts=[0, 1])[0], everyone)
    assert not torch.equal(out, everyone)
    with pytest.raises(InputError):
        layer.prune([1])


def test_a_replayed_ledger_prunes_and_recycles_nothing_twice(new_model, snapshot) -> None:
    model, ledger = new_model("moe"), []
    model.expert_layers[0].grow(2)
    census = take_census(model, 1, [{"experience": 1, "act": "grow", "layer": 0}], {})

    class Both(NeverPrune):
        def decide(self, census: Census) -> Removal:
            return Removal(experts={0: (1, 2, 4)}, cohorts={0: (0,)} if census.experience == 2 else {})

    ledger += adapt(model, census, NeverGrow(), PastExperts(), (), 0, Both())
    later = take_census(model, 2, [{"experience": 1, "act": "grow", "layer": 0}], {})
    ledger += adapt(model, later, NeverGrow(), PastExperts(), (), 0, Both())
    acts = [(event["act"], event.get("experts", event.get("cohorts"))) for event in ledger]
    assert acts == [("recycle", [1, 2, 4]), ("recycle", [1, 2, 4]), ("prune", [0])]
    again = new_model("moe", seed=1)
    again.expert_layers[0].grow(2)
    replay(again, json.loads(json.dumps(ledger)))
    again.load_state_dict(model.state_dict())
    assert snapshot(again) == snapshot(model)
    assert again.expert_layers[0].pruned_cohorts == (0,)
    assert again.expert_layers[0].frozen_cohorts == (True, False)


def test_what_freezes_at_this_boundary_does_not_start_anew(new_model) -> None:
    from cl_moe.growth import EveryExperience

    model = new_model("moe")
    census = Census(1, {0: LayerCensus((4,), (0,), (False,), peak=torch.zeros(4), lives=torch.ones(4))})
    events = adapt(model, census, EveryExperience(2), PastExperts(), (0,), 0, RecycleDead())
    assert "recycle" not in {event["act"] for event in events}
    events = adapt(new_model("moe"), census, NeverGrow(), PastExperts(), (0,), 0, RecycleDead())
    assert [event["experts"] for event in events if event["act"] == "recycle"] == [[0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("layer", "policy", "fits"),
    [
        ("moe", RecycleDead(), True),
        ("peer", RecycleDead(), False),
        ("pkm", RecycleDead(), False),
        ("peer", PruneIdle(), True),
        ("dense", PruneIdle(), False),
        ("dense", NeverPrune(), True),
    ],
)
def test_what_a_layer_cannot_do_is_refused_before_training(layer, policy, fits, new_model) -> None:
    if fits:
        check_prune(new_model(layer), policy)
        return
    with pytest.raises(InputError, match=r"recycling of single experts|without experts"):
        check_prune(new_model(layer), policy)


@pytest.mark.parametrize(
    ("build", "key"),
    [
        (lambda: RecycleDead(threshold=0), "prune.threshold"),
        (lambda: RecycleDead(patience=0), "prune.patience"),
        (lambda: RecycleDead(init="cpoy"), "prune.init"),
        (lambda: RecycleDead(noise=-1), "prune.noise"),
        (lambda: PruneIdle(patience=True), "prune.patience"),
    ],
)
def test_policies_refuse_what_cannot_be(build, key: str) -> None:
    with pytest.raises(InputError) as caught:
        build()
    assert caught.value.key == key


def test_no_ops_do_not_start_anew() -> None:
    with seeded(0, "init"):
        layer = partial(MoE, num_experts=2, hidden=8, num_noops=2, router=partial(TopK, k=2))
        model = MLPClassifier((6,), 6, layer, width=16, num_blocks=1)
    model.expert_layers[0].grow(2)
    dead = LayerCensus((4, 2), (0, 1), (False, False), peak=torch.zeros(6), lives=torch.ones(6))
    events = adapt(model, Census(2, {0: dead}), NeverGrow(), NeverFreeze(), (0,), 0, RecycleDead())
    assert [event["experts"] for event in events if event["act"] == "recycle"] == [[0, 1, 4, 5]]


def test_the_last_that_learns_is_not_pruned_where_the_others_stop(new_model) -> None:
    model = new_model("moe")
    model.expert_layers[0].grow(2)
    shares = ((1.0,), (0.99, 0.01), (0.99, 0.01))
    census = Census(3, {0: LayerCensus((4, 2), (0, 1), (False, False), shares=shares)})
    assert PruneIdle().decide(census).cohorts == {0: (1,)}
    events = adapt(model, census, NeverGrow(), Aged(3), (0,), 0, PruneIdle())
    assert [event["act"] for event in events] == ["freeze", "head"]
    assert model.expert_layers[0].frozen_cohorts == (True, False)
