"""The options of product-key retrieval that PEER and product-key memories share.

Legend: Q queries (one per token and head), C candidates of all cohorts, K retrieved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from cl_moe.errors import InputError
from cl_moe.layers.product_keys import Found
from cl_moe.layers.selection import top_k_first

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


def compete(found: Sequence[Found], k: int) -> Found:
    """The k best of several cohorts' candidates, best first; ties go to the cohort that stands first.

    Args:
        found: each cohort's best, best first, with ids for life.
        k: at most as many as there are candidates.
    """
    if len(found) == 1:
        return found[0]
    score_QC = torch.cat([f.score for f in found], dim=1)
    expert_QC = torch.cat([f.expert for f in found], dim=1)
    best_QK = top_k_first(score_QC, k)  # candidates stand in the order that ties go by
    return Found(score_QC.gather(1, best_QK), expert_QC.gather(1, best_QK))
