"""Scores of the sub-keys of several cohorts, side by side, so that one search can take them as they stand.

Legend: Q queries (one per token and head), S = 2 sides, H half of the key width, M sub-keys of all cohorts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cl_moe.layers.key_cohort import KeyCohort
from cl_moe.layers.precision import wide
from cl_moe.layers.several_grids import KeyScores


def differentiable_scores(cohorts: Sequence[KeyCohort], queries: Sequence[Tensor]) -> KeyScores:
    """The scores of each cohort's sub-keys for its own (Q, 2, H) queries, with gradients to both."""
    sides = []
    for side in range(2):
        pairs = zip(cohorts, queries, strict=True)
        parts = [cohort.scores(query_QSH, side, wide(cohort.keys)) for cohort, query_QSH in pairs]
        sides.append(parts[0] if len(parts) == 1 else torch.cat(parts, dim=1))
    return KeyScores(sides, [len(cohort.rows) for cohort in cohorts])


class ScoreRoom:
    """Room for the scores of one piece of the queries after the other, without gradients.

    Products are written where the search reads them: to gather what cohorts computed apart takes as long as
    a fifth of the products.

    Args:
        cohorts: those that are asked.
        largest_QSH: the piece that has the most queries.
    """

    def __init__(self, cohorts: Sequence[KeyCohort], largest_QSH: Tensor) -> None:
        self.keys = [(cohort, wide(cohort.keys)) for cohort in cohorts]
        self.widths = [len(cohort.rows) for cohort in cohorts]
        self._score_SQM = largest_QSH.new_empty(2, largest_QSH.shape[0], sum(self.widths))

    def __call__(self, query_QSH: Tensor) -> KeyScores:
        """The scores of a piece; those of the piece before are gone then."""
        sides = list(self._score_SQM[:, : query_QSH.shape[0]])
        for side, score_QM in enumerate(sides):
            parts = score_QM.split(self.widths, dim=1)
            for (cohort, keys), score_Qr in zip(self.keys, parts, strict=True):
                cohort.scores(query_QSH, side, keys, score_Qr)
        return KeyScores(sides, self.widths)
