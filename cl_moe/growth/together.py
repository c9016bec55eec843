"""Growth under several ranks: rank 0 decides, the others follow (law 3)."""

from __future__ import annotations

from collections.abc import Sequence

from cl_moe.agreement import from_first, is_first, num_ranks, share_values
from cl_moe.growth import PrunePolicy
from cl_moe.growth import adapt as one
from cl_moe.growth.adapt import Event, replay
from cl_moe.growth.census import Census
from cl_moe.growth.freezing import FreezePolicy
from cl_moe.growth.schedules import GrowthSchedule
from cl_moe.models.base import ContinualModel


def adapt(
    model: ContinualModel,
    census: Census,
    schedule: GrowthSchedule,
    policy: FreezePolicy,
    classes: Sequence[int],
    seed: int,
    prune: PrunePolicy,
) -> list[Event]:
    """``growth.adapt.adapt`` on rank 0; the others carry out the same events, and take rank 0's values.

    So ranks whose censuses differ in a bit, or that draw other numbers, still have one model. Returns the
    events, on every rank.
    """
    events = from_first(lambda: one.adapt(model, census, schedule, policy, classes, seed, prune))
    if num_ranks() > 1:
        if not is_first():
            replay(model, events)
        share_values(model)
    return events
