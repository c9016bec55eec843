"""Weight aligning (Zhao et al. 2020, "Maintaining discrimination and fairness", 1911.07053)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from cl_moe.errors import InputError
from cl_moe.models.base import Head
from cl_moe.strategies.base import Outlook, Setting, Strategy
from cl_moe.strategies.checks import check_beside, check_new_classes


class WeightAligning(Strategy):
    """After an experience, new classes' head rows are made as long as the old ones are on average.

    Training on much of the new and little of the old leaves the new rows longer, so that they win. From the
    second experience on their weights are multiplied by ``gamma = mean |w_old| / mean |w_new|`` (equations 6
    and 7; biases stay, as in the paper). The method's other half is replay and distillation beside it:
    ``strategy=[replay,weight_aligning,lwf]``, in this order, so that the teacher is the aligned model. The
    paper's clipping of rows at 0 while training is left out.
    """

    computes = False
    reads_batches = True
    needs_past = True

    def __init__(self) -> None:
        self.trained: list[int] = []  # classes

    def check(self, setting: Setting) -> None:
        """New classes compete with old ones, by the head."""
        check_new_classes("weight_aligning", setting.stream)
        if setting.stream.scenario == "task":
            raise InputError(
                got="strategy=weight_aligning with stream.scenario=task, where tasks do not compete",
                allowed="stream.scenario=class",
                key="strategy (or stream.scenario)",
            )
        check_beside("weight_aligning", setting, ("icarl",), "classifies without the head")

    @torch.no_grad()
    def end(self, outlook: Outlook) -> None:
        """Scale the new rows; those of a frozen cohort never change again."""
        head, old = outlook.model.head, set(self.trained)
        new = {label for label in outlook.experience.classes if label not in old}
        if old and new:
            gamma = _length(head, old) / _length(head, new)
            for rows, place, label in _rows(head):
                if label in new and rows.weight.requires_grad:
                    rows.weight[place] *= gamma
        self.trained += [label for label in outlook.experience.classes if label in new]

    def state_dict(self) -> dict[str, Any]:
        """Which classes are old."""
        return {"trained": self.trained}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take that back."""
        self.trained = list(state["trained"])


def _rows(head: Head) -> Iterator[tuple[nn.Linear, int, int]]:
    """Every row of the head: its cohort, its place there, its class."""
    labels = iter(head.classes)
    for rows in head.cohorts:
        assert isinstance(rows, nn.Linear)
        yield from ((rows, place, next(labels)) for place in range(rows.out_features))


def _length(head: Head, classes: set[int]) -> Tensor:
    """Mean length of these classes' rows, a scalar."""
    return torch.stack([r.weight[i].norm() for r, i, label in _rows(head) if label in classes]).mean()
