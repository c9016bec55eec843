"""How much of a model takes part in what it computes: effective rank and dormant units at a boundary.

Legend: D width of a representation, U hidden units of a slot.
"""

from __future__ import annotations

import lightning as L  # noqa: N812
import torch
from torch import Tensor

import cl_moe.metrics.functional as F  # noqa: N812
from cl_moe.batches import probe_rows
from cl_moe.layers.activity import Activity
from cl_moe.learner import Learner
from cl_moe.metrics import Tally
from cl_moe.models.base import ContinualModel
from cl_moe.models.watching import Seen, watched
from cl_moe.stream import Experience, take
from cl_moe.tracking.diagnostics import numbered

TAUS = (0.0, 0.025, 0.1)
ROWS = 512
"""Most representations whose singular values are taken, evenly spread over those seen."""


def observe(
    trainer: L.Trainer,
    learner: Learner,
    newest: Experience | None,
    samples: int,
    batch_size: int,
    seen: Seen | None = None,
) -> dict[str, float]:
    """The metrics ``plasticity/*`` on the probe set of the newest experience (see ``Measuring.samples``).

    A pass over it, charged as diagnostics, if it was not seen yet. The usual choice of data: the newest
    experience's (Dohare et al. 2024), so that the numbers of all boundaries are over equally many examples.

    Args:
        trainer: of the stream.
        learner: as it is now.
        newest: of the experiences trained so far; None: nothing is measured.
        samples: of its test examples; 0: nothing is measured.
        batch_size: examples per evaluation batch.
        seen: of that probe set in another evaluation; None: nothing.
    """
    if samples == 0 or newest is None:
        return {}
    if seen is None:
        probe, seen = take(newest.test, probe_rows(len(newest.test), samples)), Seen()
        learner.go_over(trainer, Tally(1), [probe], batch_size, "diagnostics", watched={0: seen})
    return plasticity_points(seen)


def plasticity_points(seen: Seen) -> dict[str, float]:
    """``plasticity/effective_rank`` of what the head reads, and dormant units of each slot; some NaN.

    ``plasticity/layer_NN/dormant_025`` is the share of .025-dormant units: the digits are thousandths.
    """
    rows = [part for part in seen.representations if len(part)]
    x_nD = torch.cat(rows) if rows else torch.zeros(0, 1, dtype=torch.float64)
    points = {"plasticity/effective_rank": F.effective_rank(x_nD[:: -(-len(x_nD) // ROWS) or 1]).item()}
    for index, activity in sorted(seen.activity.items()):
        for tau in TAUS:
            key = f"plasticity/layer_{numbered(index)}/dormant_{round(1000 * tau):03d}"
            points[key] = F.dormant_fraction(activity.mean, tau).item()
    return points


def expected_points(model: ContinualModel) -> dict[str, float]:
    """The keys that a model of this kind gives, with some value: for checking what is asked for."""
    units: Tensor = torch.ones(1, dtype=torch.float64)
    one = Activity(units, units.long())
    return plasticity_points(Seen([torch.ones(1, 1)], dict.fromkeys(watched(model), one)))
