"""Distillation of a finished run into another model, say of a sparse one into a dense one (2101.03961, 4.1).

Legend: B batch, S positions, C columns of logits, K classes that both models know.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cl_moe.errors import InputError
from cl_moe.layers.precision import wide
from cl_moe.losses import distillation_loss
from cl_moe.models.base import ContinualModel
from cl_moe.strategies.base import Outlook, Setting, Step, Strategy, tensor_bytes
from cl_moe.strategies.checks import check_probabilities
from cl_moe.strategies.teacher import check_weight
from cl_moe.stream import IGNORE

OUTSIDE = -1e30
"""For a column of another task: no probability, and no NaN where infinities would be subtracted."""


class DistillFrom(Strategy):
    """Learns from the answers of a teacher that stands still: ``hard`` x task loss + ``soft`` x KL.

    As the Switch Transformer is distilled (Fedus et al., 2101.03961, section 4.1): .75 of the loss from the
    labels, .25 from the teacher's probabilities (KL has the gradient of their cross-entropy), and the student
    begins with the teacher's weights outside its experts. Those of the body it has from ``inherit``; rows of
    the head are born with their classes, and get the teacher's values here.

    The teacher is handed in by ``cl-moe distill=...``, is never trained, and answers in evaluation mode.

    Args:
        hard: share of the labels' loss, >= 0.
        soft: share of the teacher's, >= 0.
        temperature: of both softmaxes; the paper names none, so 1.
    """

    reads_batches = True
    replaces_task_loss = True

    def __init__(self, hard: float = 0.75, soft: float = 0.25, temperature: float = 1.0) -> None:
        check_weight(hard, "strategy.distill_from.hard")
        check_weight(soft, "strategy.distill_from.soft")
        check_weight(temperature, "strategy.distill_from.temperature", above=True)
        self.hard, self.soft, self.temperature = hard, soft, temperature
        self.teacher: ContinualModel | None = None
        self.given: list[int] = []  # classes whose rows have had their chance to begin as the teacher's
        self._group_of_class: Tensor | None = None
        self._columns: tuple[Tensor, Tensor] | None = None

    def learn_from(self, teacher: ContinualModel) -> None:
        """Take a teacher; it stops learning here."""
        self.teacher = teacher.eval().requires_grad_(False)

    def check(self, setting: Setting) -> None:
        """A teacher's answers are distributions."""
        check_probabilities("distill_from", setting.stream)

    def begin(self, outlook: Outlook) -> None:
        """Give new rows of the head the teacher's values; note which columns are about the same classes."""
        teacher = self._teacher().to(next(outlook.model.parameters()).device)
        _give_rows(teacher, outlook.model, [c for c in outlook.model.head.classes if c not in self.given])
        self.given = list(outlook.model.head.classes)
        place = {label: column for column, label in enumerate(teacher.head.classes)}
        pairs = [(i, place[label]) for i, label in enumerate(self.given) if label in place]
        mine_K, theirs_K = torch.tensor(pairs).long().reshape(-1, 2).unbind(dim=1)
        device = next(teacher.parameters()).device
        self._columns = mine_K.to(device), theirs_K.to(device)
        self._group_of_class = outlook.group_of_class

    def loss(self, step: Step) -> dict[str, Tensor]:
        """``distill_soft``, the teacher's share, and ``distill_hard``, what brings the task loss to its own.

        Over the classes that both know (without any, the task loss stands alone); in the task-incremental
        scenario over those of the example's task.
        """
        assert step.task_loss is not None
        assert self._columns is not None
        mine_K, theirs_K = self._columns
        if mine_K.numel() == 0:  # nothing here that the teacher has heard of
            return {}
        with torch.no_grad():
            answer, _ = self._teacher()(step.inputs, mask=step.mask)
        student, answer = wide(step.logits[..., mine_K]), wide(answer[..., theirs_K])
        if self._group_of_class is not None:
            group_C = self._group_of_class[step.model.head.classes].to(mine_K.device)
            other_BK = group_C[mine_K] != self._group_of_class[step.targets].unsqueeze(1)
            student, answer = (x.masked_fill(other_BK, OUTSIDE) for x in (student, answer))
        if step.targets.dim() > 1:
            asked_BS = step.targets != IGNORE  # no padding, and of a masked text only what was hidden
            student, answer = student[asked_BS], answer[asked_BS]
        if len(student) == 0:  # nothing is asked of this batch, and a mean over nothing is NaN
            return {}
        return {
            "distill_hard": (self.hard - 1.0) * step.task_loss,
            "distill_soft": self.soft * distillation_loss(student, answer, self.temperature),
        }

    def costs(self, model: ContinualModel) -> dict[str, float]:
        """The teacher's parameters, and how many times the student's they are."""
        theirs = sum(p.numel() for p in self._teacher().parameters())
        mine = sum(p.numel() for p in model.parameters())
        return {"cost/teacher_params": theirs, "cost/compression": theirs / mine}

    def state_dict(self) -> dict[str, Any]:
        """Which rows were given; the teacher itself stays in its own run's folder."""
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take that back."""
        self.given = list(state["given"])

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the teacher."""
        return 0 if self.teacher is None else tensor_bytes(*self.teacher.state_dict().values())

    def _teacher(self) -> ContinualModel:
        if self.teacher is None:
            raise InputError(
                got="strategy=distill_from without a teacher",
                allowed="cl-moe distill=<run id or run folder> ...",
                key="distill",
            )
        return self.teacher


@torch.no_grad()
def _give_rows(teacher: ContinualModel, student: ContinualModel, classes: list[int]) -> None:
    """Copy the head's rows of classes that both know; heads of another width have nothing to give."""
    if teacher.head.dim != student.head.dim:
        return
    rows = {
        label: (cohort.weight[i], cohort.bias[i])
        for cohort, labels in _cohorts(teacher)
        for i, label in enumerate(labels)
    }
    for cohort, labels in _cohorts(student):
        for i, label in enumerate(labels):
            if label in classes and label in rows:
                weight, bias = rows[label]
                cohort.weight[i].copy_(weight)
                cohort.bias[i].copy_(bias)


def _cohorts(model: ContinualModel) -> list[tuple[torch.nn.Linear, list[int]]]:
    """The head's cohorts of rows with their classes."""
    pairs, first = [], 0
    for cohort in model.head.cohorts:
        assert isinstance(cohort, torch.nn.Linear)
        pairs.append((cohort, model.head.classes[first : first + cohort.out_features]))
        first += cohort.out_features
    return pairs
