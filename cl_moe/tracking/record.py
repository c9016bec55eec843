"""What a run has measured so far: plain data, kept in checkpoints, read by metrics, artifacts and figures.

Legend: T experiences, row i: after i experiences (row 0: before any training), N experts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cl_moe.layers.routing import ExpertLoad
from cl_moe.stream import Kind


@dataclass
class Record:
    """Rows of the accuracy matrix and the expert loads measured with each of them.

    Args:
        kind: ``"classification"`` (scores are accuracies) or ``"language"`` (scores are minus the loss,
            nats).
        names: name of every experience, T of them.
        rows: row i of the matrix, (T,) float64, higher is better.
        loads: for each row, ``{block index: [load on experience 0's test data, ...]}``; empty for dense
            models.
        cohorts: for each row, ``{block index: [(size, birth, frozen), ...]}``: experts per cohort, the number
            of experiences trained before its birth, and whether it had stopped learning.
        steps: optimizer steps taken before each row.
        shocks: ``{i: score just after minus just before growing}`` on the experiences seen, where it grew.
        ledger: growth and freeze events so far.
    """

    kind: Kind
    names: list[str]
    rows: list[Tensor] = field(default_factory=list)
    loads: list[dict[int, list[ExpertLoad]]] = field(default_factory=list)
    cohorts: list[dict[int, list[tuple[int, int, bool]]]] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    shocks: dict[int, float] = field(default_factory=dict)
    ledger: list[dict[str, Any]] = field(default_factory=list)

    @property
    def matrix(self) -> Tensor:
        """(rows so far, T) float64: R[i, j]."""
        return torch.stack(self.rows)

    @property
    def experiences_trained(self) -> int:
        """i of the newest row."""
        return len(self.rows) - 1

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain Python only, so that a checkpoint loads with ``weights_only=True``."""
        loads = [
            {layer: [tuple(load) for load in per_experience] for layer, per_experience in row.items()}
            for row in self.loads
        ]
        return {**vars(self), "loads": loads}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Record:
        """The record that ``state_dict`` described."""
        loads = [
            {layer: [ExpertLoad(*load) for load in per_experience] for layer, per_experience in row.items()}
            for row in state["loads"]
        ]
        return cls(**{**state, "loads": loads})
