"""Evaluation inside an experience, between two optimizer steps: it leaves training as it was, to the bit.

Legend: B batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils.data import TensorDataset

from cl_moe.batches import evaluation_loader, probe_rows
from cl_moe.learner import Learner
from cl_moe.measuring import Measuring
from cl_moe.seeds import generator_states, set_generator_states
from cl_moe.stream import Stream, take
from cl_moe.tracking import inside
from cl_moe.tracking.record import Record


class Anytime:
    """Scores the experiences so far every few steps (the stability gap, De Lange et al. 2023).

    On the probe set of each: ``eval.samples`` of its test examples, the same ones in every run.

    Args:
        learner: that is being trained.
        stream: as evaluated.
        measuring: how often, on how much.
        batch_size: examples per evaluation batch.
        alive: called after every batch.
    """

    def __init__(
        self,
        learner: Learner,
        stream: Stream,
        measuring: Measuring,
        batch_size: int,
        alive: Callable[[], None],
    ) -> None:
        self.learner, self.stream, self.measuring = learner, stream, measuring
        self.batch_size, self.alive = batch_size, alive
        self._probes: dict[int, TensorDataset] = {}  # by identity of the test set, which parts of one share

    def points(self, record: Record, step: int) -> dict[str, float]:
        """The metrics of an evaluation now, which is noted in the record; nothing if none is due.

        Args:
            record: of the run, as many rows as experiences were trained, and one.
            step: optimizer steps of the run; the last of them done.
        """
        since = step - record.steps[-1]
        if not self.measuring.due(since):
            return {}
        present = len(record.rows) - 1
        with self.learner.charges.account("diagnostics"), untouched(self.learner):
            if since == self.measuring.every:  # the first since the model was adapted
                self.learner.charges.forget(self.learner.cost_varies())
            scores: dict[int, float] = {}
            for experience in self.stream[: present + 1]:
                key = id(experience.test)
                if key not in scores:
                    scores[key] = self._score(experience.index, experience.test)
        row = torch.tensor([scores[id(e.test)] for e in self.stream[: present + 1]], dtype=torch.float64)
        return inside.add_anytime(record, present, step, row)

    def _score(self, index: int, test: TensorDataset) -> float:
        """Mean score on the probe set of one test set; NaN of nothing."""
        if id(test) not in self._probes:
            self._probes[id(test)] = take(test, probe_rows(len(test), self.measuring.samples))
        learner, precision = self.learner, self.learner.trainer.precision_plugin
        total, count = 0.0, 0
        for batch_idx, batch in enumerate(evaluation_loader(self._probes[id(test)], self.batch_size)):
            moved = tuple(part.to(learner.device) for part in batch)
            with precision.test_step_context():
                logits, targets, _ = learner.answer(precision.convert_input(moved), batch_idx, index)
                score, number = learner.score(logits, targets)
            total, count = total + score.item(), count + int(number)
            self.alive()
        return total / count if count else torch.nan


@contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards all modes and torch's generators are as before."""
    modes, states = [(part, part.training) for part in module.modules()], generator_states()
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, training in modes:
            part.training = training
        set_generator_states(states)
