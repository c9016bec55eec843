"""What a run has measured so far: plain data, kept in checkpoints, read by metrics, artifacts and figures.

Legend: T experiences, row i: after i experiences (row 0: before any training), N experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from cl_moe.layers.routing import ExpertLoad
from cl_moe.stream import Kind

Loads = dict[int, list[ExpertLoad]]


@dataclass
class Record:
    """Rows of the accuracy matrix and the expert loads measured with each of them.

    Args:
        kind: ``"classification"`` (scores are accuracies), or ``"language"`` or ``"regression"`` (scores
            are minus the loss, in nats or in squared errors).
        names: name of every experience, T of them.
        rows: row i of the matrix, (T,) float64, higher is better.
        loads: for each row, ``{block index: [load on experience 0's test data, ...]}``; empty for dense
            models, and for rows whose loads lie in a file of their own (``tracking.loads``): a checkpoint
            holds those of the newest row only.
        depths: for each row, the same for blocks that only some tokens go through (Mixture-of-Depths), by
            block index: ``count`` real tokens, ``kept`` those that went through; empty without such blocks.
        cohorts: for each row, ``{block index: [(size, birth, frozen), ...]}``: experts per cohort, the number
            of experiences trained before its birth, and whether it had stopped learning.
        steps: optimizer steps taken before each row.
        points: for each row, metrics of what is not kept: loads and choices (``tracking.diagnostics``).
        shares: for each row, ``{block index: (C, T)}``, the share of each experience's routed weight that
            goes to each cohort: the leak as a matrix.
        rewound: ``{i: (i - 1,) scores of row i with the router of the end of each old experience}``, for rows
            at which forgetting was decomposed.
        anytime: evaluations inside experiences, where they were asked for: ``{index of the experience that
            was being trained: (steps, scores)}``, (n,) int64 optimizer steps and (n, index + 1) float64
            scores of the experiences so far on a subset of their test data.
        cumulative: (T + 1, T) matrix of a cumulative run of the same stream, where one was named.
        shocks: ``{i: score just after minus just before growing}`` on the experiences seen, where it grew.
        ledger: growth and freeze events so far.
    """

    kind: Kind
    names: list[str]
    rows: list[Tensor] = field(default_factory=list)
    loads: list[Loads] = field(default_factory=list)
    cohorts: list[dict[int, list[tuple[int, int, bool]]]] = field(default_factory=list)
    depths: list[Loads] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    points: list[dict[str, float]] = field(default_factory=list)
    shares: list[dict[int, Tensor]] = field(default_factory=list)
    rewound: dict[int, Tensor] = field(default_factory=dict)
    anytime: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    cumulative: Tensor | None = None
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

    def stretched(self, names: Sequence[str]) -> Record:
        """The same of a stream to which experiences were added, on which no row was measured: NaN."""
        more = len(names) - len(self.names)
        rows = [pad(row, (0, more), value=torch.nan) for row in self.rows]
        return replace(self, names=list(names), rows=rows)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain Python only, so that a checkpoint loads with ``weights_only=True``."""
        return {**vars(self), "loads": _plain(self.loads), "depths": _plain(self.depths)}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Record:
        """The record that ``state_dict`` described."""
        loads = {name: _named(state.get(name, [])) for name in ("loads", "depths")}
        return cls(**{**state, **loads})


def _plain(rows: Sequence[Loads]) -> list[dict[int, list[tuple[Tensor, ...]]]]:
    return [{layer: [tuple(load) for load in loads] for layer, loads in row.items()} for row in rows]


def _named(rows: Sequence[dict[int, list[Any]]]) -> list[Loads]:
    return [{layer: [ExpertLoad(*load) for load in loads] for layer, loads in row.items()} for row in rows]
