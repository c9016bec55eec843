"""What schedule and policy are shown before an experience: the census, with a look at its first batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Protocol

import lightning as L  # noqa: N812
import torch
from torch import Tensor

from cl_moe.agreement import from_first
from cl_moe.anytime import untouched
from cl_moe.batches import order_of, padding_mask
from cl_moe.evaluation import Evaluation
from cl_moe.growth import Census, FreezePolicy, GrowthSchedule, Looks, PrunePolicy
from cl_moe.growth.adapt import CHANGING, take_census
from cl_moe.layers.routing import Routing, fold_load
from cl_moe.learner import Learner
from cl_moe.optim.state import begin_anew
from cl_moe.seeds import generator
from cl_moe.stream import Experience, Stream
from cl_moe.tracking import names
from cl_moe.tracking.record import Record
from cl_moe.tracking.tracker import Tracker
from cl_moe.trainer import TrainerSpec

_LOOKED_AT = 256
"""Examples of the newest experience that tell who is used, where the most used are copied."""


class Run(Protocol):
    """What is looked at of a run."""

    stream: Stream

    learner: Learner
    measured: Record
    spec: TrainerSpec
    trainer: L.Trainer
    tracker: Tracker
    growth: GrowthSchedule
    freeze: FreezePolicy
    prune: PrunePolicy
    seed_init: int
    seed_data: int


def census_of(run: Run, experience: Experience) -> Census:
    """Shapes, ages, loads, scores and losses of the past, and the losses of the first training examples.

    The looks at what comes, and at whom to copy, are charged to training: it is what the schedule costs.
    Of several ranks the first one looks, since all of them would see the same.
    """
    index, measured, learner = experience.index, run.measured, run.learner
    scores = [measured.rows[i][:i].mean().item() for i in range(1, index + 1)]
    looks, coming = learner.trace.looks, None
    if looks.samples and index > 0:
        coming = from_first(lambda: first_losses(run, experience, looks))
    census = take_census(learner.model, index, learner.ledger, {}, scores, learner.trace, coming)
    loads = from_first(
        lambda: loads_in_training(run, run.stream[index - 1]) if _copies(run, census) else None
    )
    if loads is None:
        return census
    layers = {block: replace(layer, load=loads.get(block)) for block, layer in census.layers.items()}
    return replace(census, layers=layers)


def _copies(run: Run, census: Census) -> bool:
    """Whether somebody starts as a copy of the most used before the experience to come."""
    if census.experience == 0:
        return False
    grows = run.growth.birth.init == "copy" and run.growth.decide(census).num_experts
    return bool(grows or (run.prune.init == "copy" and run.prune.decide(census).experts))


def loads_in_training(run: Run, experience: Experience) -> dict[int, Tensor]:
    """By layer (N,) float64: the score-weighted load of some training examples of the newest experience.

    Test data and older experiences' data are not looked at: who is copied is part of learning.

    Args:
        run: that has learnt it.
        experience: the last one.
    """
    found: dict[int, Tensor] = {}
    for _, _, routings in _shown(run, experience, _LOOKED_AT, 0, "loads"):
        for block, routing in routings.items():
            score_N = fold_load(routing).score.cpu()
            found[block] = found[block] + score_N if block in found else score_N
    return found


def first_losses(run: Run, experience: Experience, looks: Looks) -> Tensor:
    """(n,) float64 losses of the examples that the experience's first batches hold, before any step on them.

    Under the model as it is, before it is adapted, as in an evaluation: nothing is drawn, nothing moves.

    Args:
        run: that is about to train on it.
        experience: the next one.
        looks: how many examples.
    """
    assert run.trainer.fit_loop.max_epochs is not None
    epoch = run.trainer.fit_loop.max_epochs  # that of the pass to come
    shown = _shown(run, experience, looks.samples, epoch, "first batches")
    losses = torch.cat([run.learner.scoring.losses(logits, targets).cpu() for logits, targets, _ in shown])
    return losses[~losses.isnan()]


def _shown(
    run: Run, experience: Experience, samples: int, epoch: int, purpose: str
) -> Iterator[tuple[Tensor, Tensor, Mapping[int, Routing]]]:
    """Logits, targets and routings of an experience's first training examples in the order of an epoch."""
    learner, precision = run.learner, run.trainer.precision_plugin
    order = order_of(experience.train, run.spec.batch_size, run.seed_data, experience.index)
    order.set_epoch(epoch)
    batches = islice(order, -(-samples // run.spec.batch_size))  # a streamed order may be long
    rows = torch.cat(list(batches))[:samples]
    learner.place_classes()
    with untouched(learner), precision.test_step_context():
        for number, part in enumerate(rows.split(run.spec.eval_batch_size)):
            batch = tuple(tensor.to(learner.device) for tensor in experience.train[part])
            inputs, targets = precision.convert_input(batch)
            draw = partial(generator, run.seed_data, experience.index, purpose, number)
            inputs, targets = learner.model.pose(inputs, targets, draw)
            mask = padding_mask(targets) if learner.kind == "language" else None
            logits, routings = learner.model(inputs, mask=mask)
            yield logits, targets, routings


def deciding(
    run: Run, experience: Experience
) -> tuple[GrowthSchedule, FreezePolicy, Sequence[int], int, PrunePolicy]:
    """What decides beside the census, as ``adapt`` takes it."""
    return run.growth, run.freeze, experience.classes, run.seed_init, run.prune


def tell_decision(run: Run, experience: Experience) -> bool:
    """Tell the tracker what the schedule looked at; whether the model now answers the past otherwise."""
    measured, learner, index = run.measured, run.learner, experience.index
    measured.ledger = learner.ledger
    run.tracker.add(names.decision_points(measured, index), index)
    now = [event for event in learner.ledger if event["experience"] == index]
    for event in now:
        if event["act"] == "recycle":
            _begin_anew(learner, event["layer"], event["experts"])
    return index > 0 and not {event["act"] for event in now}.isdisjoint(CHANGING)


def _begin_anew(learner: Learner, layer: int, experts: Sequence[int]) -> None:
    """Recycled experts have neither a past nor momentum in the optimizer."""
    learner.trace.forget(layer, experts)
    body = learner.model.expert_layers[layer]
    names_of = {id(parameter): name for name, parameter in learner.named_parameters()}
    for index, cohort in enumerate(body.cohorts):
        first = sum(body.cohort_sizes[:index])
        rows = [expert - first for expert in experts if body.cohort_of(expert) == index]
        for parameter in cohort.parameters() if rows else ():
            begin_anew(learner.optimizer_state, names_of[id(parameter)], parameter.shape, rows)


def record_shock(run: Run, after: Evaluation) -> None:
    """Note how the mean score on the experiences seen jumped when the model was changed."""
    seen = len(after.row)
    shock = (after.row.mean() - run.measured.rows[-1][:seen].mean()).item()
    run.measured.shocks[seen] = shock
    run.tracker.add({"growth/shock": shock}, seen)
