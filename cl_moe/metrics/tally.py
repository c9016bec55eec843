"""All that one evaluation folds, batch by batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cl_moe.layers.routing import Routing, fold_load
from cl_moe.metrics.calibration import CalibrationErrors
from cl_moe.metrics.choices import ProbeChoices
from cl_moe.metrics.loads import ExpertLoads
from cl_moe.metrics.peaks import PeakLoads
from cl_moe.metrics.scores import ExperienceScores


class Tally:
    """Scores, calibration, expert loads and the choices of a probe set, of some test sets.

    It adds up on the device of what it is given: where the model computes is known once it computes, since
    the Trainer moves it there as an evaluation begins.

    Args:
        num_sets: how many test sets.
        probe: of each test set the rows whose choices are kept; None: of no row.
    """

    def __init__(self, num_sets: int, probe: Sequence[Tensor] | None = None) -> None:
        self.scores = ExperienceScores(num_sets)
        self.calibration = CalibrationErrors(num_sets)
        self.loads = ExpertLoads(num_sets)
        self.peaks = PeakLoads(num_sets)
        self._sums = (self.scores, self.calibration, self.loads, self.peaks)
        self.choices = ProbeChoices(probe or [torch.empty(0, dtype=torch.int64)] * num_sets)

    def update(
        self,
        test_set: int,
        scored: tuple[Tensor, Tensor],
        num_rows: int,
        routings: Mapping[int, Routing],
        sure: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Fold one batch in.

        Args:
            test_set: which one the batch is of; its batches come in order.
            scored: sum and number of scores, as ``ExperienceScores`` takes them; the sum on the device of the
                logits.
            num_rows: examples of the batch.
            routings: what was routed, by block.
            sure: probabilities of the answers and whether they are right; None where calibration is not told.
        """
        if self.scores.device != scored[0].device:  # before the first batch: nothing was added up yet
            for sums in self._sums:
                sums.to(scored[0].device)
        self.scores.update(test_set, *scored)
        if sure is not None:
            self.calibration.update(test_set, *sure)
        loads = {block: fold_load(routing) for block, routing in routings.items()}
        self.loads.update(test_set, loads)
        self.peaks.update(test_set, {block: load for block, load in loads.items() if block >= 0})
        self.choices.update(test_set, num_rows, routings)

    def calibration_errors(self) -> Tensor:
        """(sets,) float64 on the CPU; NaN where nothing was answered."""
        if not self.calibration.update_called:  # no set at all, of which torchmetrics warns
            return torch.full((self.calibration.num_experiences,), torch.nan, dtype=torch.float64)
        return self.calibration.compute().cpu()
