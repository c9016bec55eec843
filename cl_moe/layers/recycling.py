"""Dead experts of a mixture that start anew under their old ids.

Legend: n experts that start anew in one cohort.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from cl_moe.errors import InputError
from cl_moe.layers.experts import Cohort

if TYPE_CHECKING:
    from cl_moe.layers.moe import MoE


@torch.no_grad()
def recycle(layer: MoE, experts: Sequence[int], init: str, noise: float, load: Tensor | None) -> None:
    """Draw weights, router keys and selection biases of some experts anew; all other bytes stay.

    Args:
        layer: changed in place.
        experts: their ids.
        init: as in ``grow``; a copy is of the most used experts of the same width.
        noise: of copies, relative to the copied tensor's standard deviation.
        load: (N,) that copies rank by; None: all equal.

    Raises:
        InputError: one of them is frozen, does nothing by design (no-op), or is not there.
    """
    for index, rows_n in _by_cohort(layer, experts):
        cohort = layer.cohorts[index]
        newborn = layer.newborn_like(index, len(rows_n), init, noise, load)
        old, new = cohort.state_dict(), newborn.state_dict()  # what they hold is shared, not copied
        for name, values in old.items():
            values[rows_n] = new[name].to(values)


def _by_cohort(layer: MoE, experts: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
    """Cohorts that hold some of these experts, and the experts' rows there."""
    left, first = sorted(experts), 0
    if left and left[0] < 0:
        raise _refused(layer, left)
    for index, size in enumerate(layer.cohort_sizes):
        rows = [expert - first for expert in left if first <= expert < first + size]
        left = [expert for expert in left if expert >= first + size]
        if rows and (
            layer.frozen_cohorts[index] or rows[-1] >= cast(Cohort, layer.cohorts[index]).num_computing
        ):
            raise _refused(layer, [first + row for row in rows])
        if rows:
            yield index, torch.tensor(rows)
        first += size
    if left:
        raise _refused(layer, left)


def _refused(layer: MoE, experts: Sequence[int]) -> InputError:
    return InputError(
        got=f"recycling of experts {list(experts)}, of which some are frozen, no-ops, or not there",
        allowed=f"ids below {layer.num_experts} of experts that compute, in cohorts that learn",
        key="experts",
    )
