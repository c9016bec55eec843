"""What decisions mean for a model: the events that ``adapt`` then carries out. Nothing is changed here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cl_moe.errors import InputError
from cl_moe.growth.budget import sizes_after
from cl_moe.growth.census import Census
from cl_moe.growth.freezing import Stop
from cl_moe.growth.pruning import PrunePolicy
from cl_moe.growth.schedules import GrowthSchedule
from cl_moe.models.base import ContinualModel

Event = dict[str, Any]


def decided(
    model: ContinualModel, census: Census, schedule: GrowthSchedule, new_classes: int
) -> tuple[int, list[Event]]:
    """How many are born, and what is noted of the decision: nothing if the calendar alone decided."""
    decision, budget = schedule.decide(census), schedule.birth.budget
    newborns, numbers = decision.num_experts, dict[str, object]()
    if newborns and budget.bounded:
        size = sizes_after(model, [newborns], schedule.birth.hidden, new_classes)[-1]
        if (over := budget.exceeded(size)) is not None:
            if budget.on_exceed == "refuse":
                raise budget.refusal(size, census.experience)
            newborns, numbers["over_budget"] = 0, over
    if decision.measure:
        numbers |= {"measure": decision.measure, "statistic": decision.statistic}
        numbers |= {"threshold": decision.threshold, **decision.more}
    if not numbers:
        return newborns, []
    wanted = {"wanted": decision.num_experts, "born": newborns}
    return newborns, [{"experience": census.experience, "act": "decide", **wanted, **numbers}]


def stopped_by(model: ContinualModel, at: int, stop: Stop, newborns: int) -> list[Event]:
    """What a policy's decision means for each layer.

    Raises:
        InputError: no expert of a layer would be left to learn, and none is born.
    """
    if stop.everything:
        return [{"experience": at, "act": "freeze_all"}]
    events = []
    for layer, body in model.expert_layers.items():
        alive = [index for index, frozen in enumerate(body.frozen_cohorts) if not frozen]
        cohorts = alive if stop.cohorts else [index for index in stop.only.get(layer, ()) if index in alive]
        if alive and cohorts == alive and not newborns:
            raise InputError(
                got=f"no expert of layer {layer} left to learn from experience {at} on",
                allowed="growth beside a policy that stops every cohort",
                key="freeze (or growth)",
            )
        if stop.cohorts or cohorts or stop.shared_router:
            events.append(event_of(at, "freeze", layer, cohorts=cohorts, shared=stop.shared_router))
    return events


def ended_by(
    model: ContinualModel, census: Census, policy: PrunePolicy, stopped: Sequence[Event]
) -> list[Event]:
    """What a prune policy's decision means for each layer; what is being stopped starts not anew.

    The last cohort that learns goes on, also where the others stop at this very boundary.
    """
    if any(event["act"] == "freeze_all" for event in stopped):
        return []
    removal, at, events = policy.decide(census), census.experience, list[Event]()
    for layer, body in model.expert_layers.items():
        gone = [c for e in stopped if e["act"] == "freeze" and e["layer"] == layer for c in e["cohorts"]]
        frozen = [index in gone or is_frozen for index, is_frozen in enumerate(body.frozen_cohorts)]
        dead = removal.experts.get(layer, ())
        ids = [e for e in dead if not frozen[body.cohort_of(e)] and body.computes(e)]
        if ids:
            events.append(event_of(at, "recycle", layer, experts=ids, init=policy.init, noise=policy.noise))
        cohorts, alive = (
            list(removal.cohorts.get(layer, ())),
            [i for i, stop in enumerate(frozen) if not stop],
        )
        if alive and {*alive} <= {*cohorts}:
            cohorts.remove(alive[-1])
        if cohorts:
            events.append(event_of(at, "prune", layer, cohorts=cohorts))
    return events


def event_of(experience: int, act: str, layer: int, **details: object) -> Event:
    """One act on one layer."""
    return {"experience": experience, "act": act, "layer": layer, **details}
