"""The options of product-key retrieval that PEER and product-key memories share.

Legend: Q queries (one per token and head), K retrieved.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from torch import Tensor

from cl_moe.errors import InputError
from cl_moe.layers.product_keys import Found
from cl_moe.layers.several_grids import KeyScores, search_grids, search_shells

_ALLOWED = {
    "keys": ("shared", "per_head"),
    "queries": ("shared", "per_cohort"),
    "gate": ("softmax", "sigmoid"),
    "policy": ("compete", "sum"),
    "grow_by": ("grid", "shell"),
}


@dataclass(frozen=True)
class Retrieval:
    """Who owns keys and queries, how scores become weights, and how cohorts live together.

    Args:
        keys: ``"shared"``: all heads have the same sub-keys (2407.04153, section 2.2); ``"per_head"``: every
            head has its own (1907.05242, section 3.1), all of them for the same experts.
        queries: ``"shared"``: one query net for all cohorts; ``"per_cohort"``: each has its own, born and
            frozen with it.
        gate: ``"softmax"`` over the scores that a head retrieved, or ``"sigmoid"`` of each (2407.04153,
            equation 2 leaves both open).
        policy: ``"compete"``: a head takes the top k over all cohorts; ``"sum"``: each cohort takes its own
            top k with its own softmax, and the outputs add, so what a token costs grows with the cohorts.
        grow_by: ``"grid"``: a newborn cohort is a square grid of its own; ``"shell"``: it makes the one grid
            larger, from n x n to m x m, and holds the new rows' and columns' sub-keys and the m^2 - n^2 new
            experts, most of which pair a new sub-key with an old one.
    """

    keys: str = "shared"
    queries: str = "shared"
    gate: str = "softmax"
    policy: str = "compete"
    grow_by: str = "grid"

    def __post_init__(self) -> None:
        for field in fields(self):
            value, allowed = getattr(self, field.name), _ALLOWED[field.name]
            if value not in allowed:
                raise InputError(
                    got=f"{field.name}={value}",
                    allowed=" or ".join(allowed),
                    key=f"layer.retrieval.{field.name}",
                )

    def weights(self, score_QK: Tensor) -> Tensor:
        """(Q, K) gating weights of retrieved scores."""
        return score_QK.softmax(dim=-1) if self.gate == "softmax" else score_QK.sigmoid()

    def search(
        self,
        scores: KeyScores,
        rows: Mapping[int, range],
        firsts: Mapping[int, int],
        k: int,
    ) -> list[Found]:
        """What is retrieved, (Q, k) with ids for life: one list, or under ``sum`` one of each cohort.

        Args:
            scores: of the cohorts that are searched; of shells also where one is not searched itself.
            rows: the rows (and columns) of each cohort that is searched, in its grid.
            firsts: the id of its first expert.
            k: at most the experts that are searched, under ``sum`` of every cohort.
        """
        if self.grow_by == "shell":
            groups = [[shell] for shell in rows.values()] if self.policy == "sum" else [list(rows.values())]
            return [search_shells(scores, group, k) for group in groups]
        if self.policy == "sum":
            return [search_grids(scores.of(at), [first], k) for at, first in enumerate(firsts.values())]
        return [search_grids(scores, list(firsts.values()), k)]
