"""One row of the accuracy matrix: scores and expert loads on the test data of experiences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import lightning as L  # noqa: N812
from torch import Tensor

from cl_moe.batches import evaluation_loader
from cl_moe.layers.routing import ExpertLoad
from cl_moe.learner import Learner
from cl_moe.metrics import ExperienceScores, ExpertLoads
from cl_moe.models.base import depth_key
from cl_moe.stream import Experience


class Evaluation(NamedTuple):
    """What an evaluation found.

    Args:
        row: (experiences,) float64, mean score on each one's test data.
        loads: ``{index of the expert layer: [load on each experience's test data]}``.
        depths: the same for blocks at depth, by block: of real tokens (``count``), those that went through
            (``kept``).
    """

    row: Tensor
    loads: dict[int, list[ExpertLoad]]
    depths: dict[int, list[ExpertLoad]]


def evaluate(
    trainer: L.Trainer, learner: Learner, experiences: Sequence[Experience], batch_size: int
) -> Evaluation:
    """Score the learner on the test data of each experience.

    Experiences that share a test set (parts of one that was cut) are scored once.
    """
    distinct = {id(experience.test): experience.test for experience in experiences}
    place = {key: index for index, key in enumerate(distinct)}
    learner.scores = ExperienceScores(len(distinct)).to(learner.device)
    learner.loads = ExpertLoads(len(distinct)).to(learner.device)
    loaders = [evaluation_loader(data, batch_size) for data in distinct.values()]
    trainer.test(learner, dataloaders=loaders, verbose=False)
    chosen = [place[id(experience.test)] for experience in experiences]
    loads = {index: [per_set[at] for at in chosen] for index, per_set in learner.loads.compute().items()}
    return Evaluation(
        learner.scores.compute().cpu()[chosen],
        {index: row for index, row in loads.items() if index >= 0},
        {depth_key(index): row for index, row in loads.items() if index < 0},
    )
