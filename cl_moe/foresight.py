"""What schedule and policy are shown before an experience: the census, with a look at its first batches."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Protocol

import lightning as L  # noqa: N812
import torch
from torch import Tensor

from cl_moe.anytime import untouched
from cl_moe.batches import order_of, padding_mask
from cl_moe.evaluation import Evaluation
from cl_moe.growth import Census, FreezePolicy, GrowthSchedule, Looks, PrunePolicy
from cl_moe.growth.adapt import CHANGING, take_census
from cl_moe.learner import Learner
from cl_moe.seeds import generator
from cl_moe.stream import Experience
from cl_moe.tracking import names
from cl_moe.tracking.record import Record
from cl_moe.tracking.tracker import Tracker
from cl_moe.trainer import TrainerSpec


class Run(Protocol):
    """What is looked at of a run."""

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

    The look at what comes is charged to training: it is what the schedule costs.
    """
    index, measured, learner = experience.index, run.measured, run.learner
    loads = {}
    if index > 0:
        for block, per_experience in measured.loads[-1].items():
            loads[block] = torch.stack([load.score for load in per_experience[:index]]).sum(0)
    scores = [measured.rows[i][:i].mean().item() for i in range(1, index + 1)]
    looks, coming = learner.trace.looks, None
    if looks.samples and index > 0:
        coming = first_losses(run, experience, looks)
    return take_census(learner.model, index, learner.ledger, loads, scores, learner.trace, coming)


def first_losses(run: Run, experience: Experience, looks: Looks) -> Tensor:
    """(n,) float64 losses of the examples that the experience's first batches hold, before any step on them.

    Under the model as it is, before it is adapted, as in an evaluation: nothing is drawn, nothing moves.

    Args:
        run: that is about to train on it.
        experience: the next one.
        looks: how many examples.
    """
    learner, precision, found = run.learner, run.trainer.precision_plugin, list[Tensor]()
    order = order_of(experience.train, run.spec.batch_size, run.seed_data, experience.index)
    assert run.trainer.fit_loop.max_epochs is not None
    order.set_epoch(run.trainer.fit_loop.max_epochs)  # that of the pass to come
    batches = islice(order, -(-looks.samples // run.spec.batch_size))  # a streamed order may be long
    rows = torch.cat(list(batches))[: looks.samples]
    learner.place_classes()
    with untouched(learner), precision.test_step_context():
        for number, part in enumerate(rows.split(run.spec.eval_batch_size)):
            batch = tuple(tensor.to(learner.device) for tensor in experience.train[part])
            inputs, targets = precision.convert_input(batch)
            found.append(_losses(learner, inputs, targets, run.seed_data, experience.index, number))
    losses = torch.cat(found)
    return losses[~losses.isnan()]


def _losses(
    learner: Learner, inputs: Tensor, targets: Tensor, seed: int, experience: int, number: int
) -> Tensor:
    model = learner.model
    inputs, targets = model.pose(
        inputs, targets, lambda: generator(seed, experience, "first batches", number)
    )
    mask = padding_mask(targets) if learner.kind == "language" else None
    logits, _ = model(inputs, mask=mask)
    return learner.scoring.losses(logits, targets).cpu()


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
    """Recycled experts have neither a past nor moments in the optimizer."""
    learner.trace.forget(layer, experts)
    body = learner.model.expert_layers[layer]
    names_of = {id(parameter): name for name, parameter in learner.named_parameters()}
    for index, cohort in enumerate(body.cohorts):
        first = sum(body.cohort_sizes[:index])
        rows = [expert - first for expert in experts if body.cohort_of(expert) == index]
        for parameter in cohort.parameters() if rows else ():
            for value in learner.optimizer_state.get(names_of[id(parameter)], {}).values():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    value[rows] = 0.0


def record_shock(run: Run, after: Evaluation) -> None:
    """Note how the mean score on the experiences seen jumped when the model was changed."""
    seen = len(after.row)
    shock = (after.row.mean() - run.measured.rows[-1][:seen].mean()).item()
    run.measured.shocks[seen] = shock
    run.tracker.add({"growth/shock": shock}, seen)
