"""One row of the accuracy matrix: scores, expert loads and choices on the test data of experiences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import lightning as L  # noqa: N812
import torch
from torch import Tensor
from torch.nn.functional import pad

from cl_moe import agreement
from cl_moe.batches import probe_rows
from cl_moe.growth.adapt import births
from cl_moe.layers.routing import ExpertLoad
from cl_moe.learner import Learner
from cl_moe.measuring import Measuring, Past, uneven_layers
from cl_moe.metrics import Tally
from cl_moe.metrics.answers import mean_of
from cl_moe.metrics.functional import Choices
from cl_moe.models.base import depth_key
from cl_moe.models.watching import Seen
from cl_moe.stream import Experience
from cl_moe.tracking import diagnostics, inside
from cl_moe.tracking.record import Record


class Evaluation(NamedTuple):
    """What an evaluation found.

    Args:
        row: (experiences,) float64, mean score on each one's test data; what was not evaluated is NaN in the
            matrix.
        loads: ``{index of the expert layer: [load on each experience's test data]}``.
        depths: the same for blocks at depth, by block: of real tokens (``count``), those that went through
            (``kept``).
        peaks: ``{index of the expert layer: (experiences, 2)}``: see ``PeakLoads``.
        choices: of each experience's probe set, by index of the expert layer.
        seen: of the model on the newest experience's probe set, if that is the whole test set; else None.
        calibration: (experiences,) float64 expected calibration error; NaN for language, and where nothing
            was answered.
        rewound: (old experiences,) float64 scores with the router as it was, where that was asked for.
        beside: metrics of passes of their own: plasticity, and what a language model reads.
    """

    row: Tensor
    loads: dict[int, list[ExpertLoad]]
    depths: dict[int, list[ExpertLoad]]
    peaks: dict[int, Tensor]
    choices: list[dict[int, Choices]]
    calibration: Tensor
    seen: Seen | None = None
    rewound: Tensor | None = None
    beside: Mapping[str, float] = {}


def evaluate(
    trainer: L.Trainer,
    learner: Learner,
    experiences: Sequence[Experience],
    batch_size: int,
    samples: int = 0,
    newest: Experience | None = None,
) -> Evaluation:
    """Score the learner on the test data of each experience.

    Experiences that share a test set (parts of one that was cut) are scored once. The choices of a probe set
    are taken from this very pass: ``samples`` examples of each test set, the same ones in every run. So is
    what plasticity asks for, where the ``newest`` experience's probe set is its whole test set.
    """
    if not experiences:  # a stream of which nothing has been learnt, and what comes is not known
        none = torch.empty(0, dtype=torch.float64)
        return Evaluation(none, {block: [] for block in learner.model.expert_layers}, {}, {}, [], none)
    distinct = {id(experience.test): experience.test for experience in experiences}
    place = {key: index for index, key in enumerate(distinct)}
    tally = Tally(len(distinct), [probe_rows(len(data), samples) for data in distinct.values()])
    watched: dict[int, Seen] = {}
    if newest is not None and len(newest.test) <= samples:
        watched[place[id(newest.test)]] = Seen()
    learner.go_over(trainer, tally, distinct.values(), batch_size, watched=watched)
    chosen = [place[id(experience.test)] for experience in experiences]
    loads = {index: [per_set[at] for at in chosen] for index, per_set in tally.loads.compute().items()}
    peaks, choices = tally.peaks.compute(), tally.choices.compute()
    return Evaluation(
        tally.scores.compute().cpu()[chosen],
        {index: row for index, row in loads.items() if index >= 0},
        {depth_key(index): row for index, row in loads.items() if index < 0},
        {index: sums.cpu()[chosen] for index, sums in peaks.items()},
        [choices[at] for at in chosen],
        tally.calibration_errors()[chosen],
        next(iter(watched.values()), None),
    )


def rewind(
    trainer: L.Trainer,
    learner: Learner,
    experiences: Sequence[Experience],
    batch_size: int,
    past: Past,
    row: Tensor,
) -> Tensor:
    """(old experiences,) R_w: scores with the router of the end of each old experience (FORMULAS 2).

    A pass over the test data of those experiences since which anything of the router, the cohorts or the
    head's classes changed; of the others the score is what it is without. NaN where the router was not kept,
    as in a branch of a run that never decomposed.

    Args:
        trainer: of the stream.
        learner: as it is now.
        experiences: those trained before the newest.
        batch_size: as in the evaluation that gave ``row``.
        past: the routers.
        row: (experiences of the stream,) the scores of now.
    """
    rewound, changed = row[: len(experiences)].clone(), []
    for experience in experiences:
        then = past.routers.get(experience.index)
        if then is None:
            rewound[experience.index] = torch.nan
        elif not then.is_of(learner.model):
            changed.append((experience, then))
    if changed:
        tally, data = Tally(len(changed)), [experience.test for experience, _ in changed]
        routers = [then for _, then in changed]
        learner.go_over(trainer, tally, data, batch_size, "diagnostics", routers)
        rewound[[experience.index for experience, _ in changed]] = tally.scores.compute().cpu()
    return rewound


def enter(
    record: Record, found: Evaluation, past: Past, measuring: Measuring, learner: Learner, step: int
) -> None:
    """Add a row to the record, with what is told from it and from the past; then let it be past.

    Args:
        record: of the run; its ledger becomes the learner's.
        found: by the evaluation after so many experiences as the record has rows.
        past: what the row is held against; it takes up the experience that was just trained.
        measuring: what it is to take up.
        learner: as it was evaluated.
        step: optimizer steps so far.
    """
    boundary, T = len(record.rows), len(record.names)
    record.rows.append(pad(found.row, (0, T - len(found.row)), value=math.nan))
    record.loads.append(found.loads)
    record.depths.append(found.depths)
    record.ledger = learner.ledger
    record.steps.append(step)
    record.cohorts.append(
        {
            block: list(
                zip(layer.cohort_sizes, births(record.ledger, block), layer.frozen_cohorts, strict=True)
            )
            for block, layer in learner.model.expert_layers.items()
        }
    )
    if found.rewound is not None:
        record.rewound[boundary] = found.rewound
    if boundary > 0:
        past.remember(boundary - 1, learner.model, found.choices[boundary - 1], measuring)
    record.shares.append(diagnostics.shares(record, boundary))
    points = diagnostics.load_metrics(record, boundary) | diagnostics.latencies(found.peaks, boundary)
    points |= diagnostics.changes(found.choices, past.choices, T) | dict(found.beside)
    points |= diagnostics.takers(found.choices[:boundary], uneven_layers(learner.model))
    points |= inside.calibration_points(record, boundary, found.calibration)
    online = mean_of(agreement.of_all(learner.online.state_dict()))
    points |= inside.online_points(record, boundary, online)
    learner.online.reset()  # an experience without training data scores nothing
    if boundary > 0 and measuring.every is not None:
        inside.open_anytime(record, boundary - 1)
    record.points.append({key: value for key, value in points.items() if math.isfinite(value)})
