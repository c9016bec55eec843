"""The one function that changes a model (law 3), and the ledger that says what it did.

An event is a plain dict, so that a ledger goes into a checkpoint and into JSON. Deciding, carrying out and
replaying share ``apply``: a replayed ledger rebuilds a model's shape and frozen parts, then the weights load.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from cl_moe.errors import InputError
from cl_moe.growth.census import Census, LayerCensus
from cl_moe.growth.deciding import Event, decided, ended_by, event_of, stopped_by
from cl_moe.growth.freezing import FreezePolicy
from cl_moe.growth.pruning import NeverPrune, PrunePolicy
from cl_moe.growth.schedules import GrowthSchedule
from cl_moe.growth.trace import Trace
from cl_moe.layers.moe import MoE
from cl_moe.layers.upcycle import computes_the_same
from cl_moe.layers.upcycle import upcycle as upcycle_layer
from cl_moe.models.base import ContinualModel
from cl_moe.models.inherit import inherit
from cl_moe.seeds import seeded

NOTES = ("decide", "upcycle", "cut")
"""Acts that change no shape: a schedule's decision, weights that were filled, a budget that was spent."""
CHANGING = ("grow", "upcycle", "recycle", "prune")
"""Acts after which a model may answer otherwise than before, at once."""


def adapt(
    model: ContinualModel,
    census: Census,
    schedule: GrowthSchedule,
    policy: FreezePolicy,
    classes: Sequence[int],
    seed: int,
    prune: PrunePolicy = NeverPrune(),  # noqa: B008 - it has no state
) -> list[Event]:
    """Freeze, prune, then grow, before an experience; returns what was done, for the ledger.

    Args:
        model: changed in place.
        census: what schedule and policy may see.
        schedule: how many experts are born in each expert layer.
        policy: what stops learning.
        classes: classes of the experience; those without head rows get a cohort of rows.
        seed: newborns are drawn from (seed, experience, layer), whatever was drawn before.
        prune: what ends.

    Raises:
        InputError: growth is asked of a model without expert layers, or nothing is left to learn.
    """
    at = census.experience
    new_classes = [label for label in classes if label not in model.head.arrived]
    newborns, events = decided(model, census, schedule, len({*new_classes} - {*model.head.classes}))
    events += stopped_by(model, at, policy.decide(census, newborns), newborns)
    events += ended_by(model, census, prune, events)
    if new_classes:
        events.append({"experience": at, "act": "head", "classes": new_classes})
    if newborns:
        birth = schedule.birth
        details = {"num_experts": newborns, "init": birth.init, "noise": birth.noise}
        if birth.hidden is not None:
            details["hidden"] = birth.hidden
        events += [event_of(at, "grow", layer, **details) for layer in model.expert_layers]
    loads = {layer: body.load for layer, body in census.layers.items()}
    for event in events:
        with seeded(seed, at, event["act"], event.get("layer", -1)):
            apply(model, event, loads)
    changed = any(event["act"] != "decide" for event in events)
    if changed and not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError(
            got=f"nothing left to learn from experience {at} on",
            allowed="growth or new classes beside freeze=all_past",
            key="freeze (or growth)",
        )
    return events


def add_classes(
    model: ContinualModel, groups: Iterable[Sequence[int]], seed: int, ahead: bool = False
) -> list[Event]:
    """Head rows for classes that are there before any training; returns the events.

    Args:
        model: changed in place.
        groups: of classes, one per cohort of rows.
        seed: rows are drawn from (seed, group).
        ahead: the rows are ahead of their classes, which the scenario withholds till they come.
    """
    mark = {"ahead": True} if ahead else {}
    events = [{"experience": 0, "act": "head", "classes": list(group), **mark} for group in groups]
    for index, event in enumerate(events):
        with seeded(seed, "head at the start", index):
            apply(model, event, {})
    return events


def upcycle(
    model: ContinualModel, dense: ContinualModel, experience: int, noise: float, seed: int
) -> list[Event]:
    """Let a mixture go on from a dense model (Komatsuzaki et al., 2212.05055); returns the events.

    Every expert becomes a copy of the dense layer that stands in its layer's place; all else is taken over.
    The router's keys stay as they were drawn, and what was frozen before stays frozen, copies included.

    Args:
        model: of the dense one's shape outside its expert layers, head included; changed in place.
        dense: what it goes on from.
        experience: the next one.
        noise: of the copies, relative to each tensor's own standard deviation; >= 0.
        seed: the noise is drawn from (seed, experience, layer).

    Raises:
        InputError: one of the two has the wrong kind of layers, or a layer cannot be copied into experts.
    """
    if not model.expert_layers or dense.expert_layers:
        raise InputError(
            got="upcycle=true " + ("of a run with experts" if dense.expert_layers else "into a dense layer"),
            allowed="a parent with layer=dense and a child with layer=moe, or upcycle=false",
            key="layer (or upcycle, or branch)",
        )
    places, old = {part: name for name, part in model.named_modules()}, dict(dense.named_modules())
    _inherit_trunk(model, dense, tuple(f"{places[layer]}." for layer in model.expert_layers.values()))
    events = []
    for index, layer in model.expert_layers.items():
        # a foreign model's layer stands in a slot, its dense one does not
        source = old.get(places[layer], old.get(places[layer].removesuffix(".layer")))
        if source is None:
            raise _differs(places[layer])
        with seeded(seed, experience, "upcycle", index):
            # what the parent froze is frozen here already, and has to be filled once
            upcycle_layer(layer, source, exact=False, noise=noise, allow_frozen=True)
        assert isinstance(layer, MoE)
        details = {"num_experts": layer.num_experts, "noise": noise}
        details["exact"] = computes_the_same(layer, source)
        events.append(event_of(experience, "upcycle", index, **details))
    return events


def _inherit_trunk(model: ContinualModel, dense: ContinualModel, experts: tuple[str, ...]) -> None:
    """Take over all that stands outside the experts, and refuse a model in which something else is new."""
    taken = {*inherit(model, dense.state_dict())}
    for name in model.state_dict():
        if name not in taken and not name.startswith(experts):
            raise _differs(name)


def _differs(name: str) -> InputError:
    return InputError(
        got=f"{name}, which the dense parent does not have in that shape",
        allowed="a child that differs from its parent in the expert layers only",
        key="model (or upcycle)",
    )


def replay(model: ContinualModel, ledger: Iterable[Event]) -> None:
    """Give a fresh model the shape and the frozen parts that a ledger describes; weights are loaded next."""
    for event in ledger:
        # A copy needs loads that are gone, and its values are about to be overwritten: only the shape counts.
        if event["act"] != "recycle":
            apply(model, {**event, "init": "fresh"} if event["act"] == "grow" else event, {})


def apply(model: ContinualModel, event: Event, loads: Mapping[int, Tensor | None]) -> None:
    """Carry out one event."""
    if event["act"] == "freeze_all":
        freeze_all(model)
    elif event["act"] == "head":
        model.head.grow(event["classes"], ahead=event.get("ahead", False))
    elif event["act"] == "freeze":
        model.expert_layers[event["layer"]].freeze(event["cohorts"], shared=event["shared"])
    elif event["act"] == "grow":
        layer = model.expert_layers[event["layer"]]
        # only layers whose experts have a hidden width take one; the ledger names it only where it differs
        options = {name: event[name] for name in ("init", "noise", "hidden") if name in event}
        layer.grow(event["num_experts"], load=loads.get(event["layer"]), **options)
    elif event["act"] == "prune":
        model.expert_layers[event["layer"]].prune(event["cohorts"])
    elif event["act"] == "recycle":
        body, load = model.expert_layers[event["layer"]], loads.get(event["layer"])
        body.recycle(event["experts"], event["init"], event["noise"], load)
    elif event["act"] not in NOTES:
        raise ValueError(f"unknown act {event['act']!r} in the ledger")


def freeze_all(model: ContinualModel) -> None:
    """Stop every parameter and every running statistic that exists now."""
    for part in model.modules():
        if callable(stop := getattr(part, "freeze_statistics", None)):
            stop()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None


def births(ledger: Iterable[Event], layer: int) -> list[int]:
    """For each cohort of a layer, the number of experiences trained before its birth."""
    grown = [e["experience"] for e in ledger if e["act"] == "grow" and e["layer"] == layer]
    return [0, *grown]


def take_census(
    model: ContinualModel,
    experience: int,
    ledger: Sequence[Event],
    loads: Mapping[int, Tensor],
    scores: Sequence[float] = (),
    trace: Trace | None = None,
    coming: Tensor | None = None,
) -> Census:
    """The census before an experience.

    Args:
        model: as it is.
        experience: index of the next one.
        ledger: of the model.
        loads: measured last, by layer.
        scores: mean score over the experiences seen, after each.
        trace: of the training so far; None: none was kept.
        coming: losses of the next experience's first training examples.
    """
    trace = Trace() if trace is None else trace
    layers = {}
    for index, layer in model.expert_layers.items():
        trained, peak, lives = trace.of_layer(index, layer.num_experts) or (None, None, None)
        layers[index] = LayerCensus(
            sizes=layer.cohort_sizes,
            births=tuple(births(ledger, index)),
            frozen=layer.frozen_cohorts,
            load=loads.get(index),
            trained=trained,
            peak=peak,
            lives=lives,
            shares=tuple(tuple(row) for row in trace.shares.get(index, ())),
            pruned=layer.pruned_cohorts,
        )
    losses, reference = tuple(trace.means), trace.newest if len(trace.newest) else None
    return Census(experience, layers, tuple(scores), losses, reference, coming)
