"""What a learner is asked, and what counts as right: losses, scores, and which columns compete.

Legend: B batch, S positions, C columns of logits (classes known so far), V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from cl_moe.batches import is_asked
from cl_moe.errors import InputError
from cl_moe.layers.precision import wide
from cl_moe.metrics.answers import confidences, right_answers, token_score
from cl_moe.stream import IGNORE, Stream, is_loss


class Scoring:
    """Losses and scores of one stream's kind and scenario (law 7).

    Args:
        stream: for its kind, scenario and classes; its data is never touched here.

    Attributes:
        group_of_class: (classes,) int64, the task of each class, where the scenario gives it away; else None.
        column_of_class: (classes,) int64, -1 for a class that has no column yet.
    """

    def __init__(self, stream: Stream) -> None:
        self.kind = stream.kind
        self.group_of_class = stream.group_of_class() if stream.scenario == "task" else None
        self.column_of_class = torch.full((stream.num_classes,), -1)
        self._classes: list[int] = []
        self._arrived = 0
        self._in_order = False  # whether a class is its own column, which spares a look-up in every step

    def place(self, classes: Sequence[int], device: torch.device, arrived: int | None = None) -> None:
        """Note which column of the logits each class has, and put it where the model computes.

        Args:
            classes: of the head, in the order of its columns.
            device: of the logits to come.
            arrived: of the first columns, whose classes have come; None: of all.
        """
        self._classes = list(classes)
        self._arrived = len(self._classes) if arrived is None else arrived
        self.column_of_class = torch.full_like(self.column_of_class, -1, device=device)
        self._in_order = self._classes == list(range(len(classes)))
        if self.kind == "classification" and classes:
            self.column_of_class[self._classes] = torch.arange(len(classes), device=device)
        if self.group_of_class is not None:
            self.group_of_class = self.group_of_class.to(device)

    def task_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy, nats per example or real token; of numbers, the mean squared error."""
        if self.kind == "regression":
            check_shape(logits, targets)
            return (wide(logits) - wide(targets)).square().mean()
        if self.kind == "language":
            return F.cross_entropy(wide(logits.flatten(0, 1)), targets.flatten(), ignore_index=IGNORE)
        columns = targets if self._in_order else self.column_of_class[targets]
        return F.cross_entropy(wide(self.own_task(logits, targets)), columns)

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """(B,) float64 nats of each example (language: on average over its real tokens; NaN without any).

        Infinite for a class that has no column yet: the model gives it no probability. Of numbers, each
        example's mean squared error.
        """
        logits = logits.detach()
        if self.kind == "regression":
            return _squares(logits, targets).unsqueeze(-1).flatten(1).mean(dim=1)
        if self.kind == "language":
            return _window_losses(logits, targets)
        column_B = self.column_of_class[targets]
        loss_B = torch.full(targets.shape, math.inf, dtype=torch.float64, device=logits.device)
        known_B = (column_B >= 0) & (column_B < self._arrived)  # rows may stand ahead of their classes
        if bool(known_B.any()):
            own_BC = self.own_task(logits, targets)[known_B].double()
            loss_B[known_B] = F.cross_entropy(own_BC, column_B[known_B], reduction="none")
        return loss_B

    @staticmethod
    def asked(targets: Tensor) -> Tensor:
        """() number of answers that the task loss is a mean over."""
        return is_asked(targets).sum()

    def own_task(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Logits with other tasks' columns at -inf where the scenario gives the task away; else unchanged."""
        if self.group_of_class is None:
            return logits
        task_C = self.group_of_class[self._classes]
        return logits.masked_fill(task_C != self.group_of_class[targets].unsqueeze(1), -math.inf)

    def tasks(self, targets: Tensor) -> Tensor | None:
        """(B,) int64 number of each example's task, where the scenario gives it away; else None."""
        return None if self.group_of_class is None else self.group_of_class[targets]

    def score(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Sum and number of scores: right answers, minus the nats of real tokens, or minus squared errors.

        A class that has not come yet is no answer, and never answered right, its rows born or not.
        """
        if self.kind == "regression":
            return -_squares(logits.detach(), targets).sum(), self.asked(targets)
        if self.kind == "language":
            return token_score(logits, targets)
        logits, column_B = self._of_arrived(logits, targets)
        missing = self._arrived - logits.shape[1]  # classes that came later than a router of the past
        logits = F.pad(logits, (0, missing), value=-math.inf) if missing else logits
        right_B = right_answers(self.own_task(logits, targets), column_B)
        return right_B.double().sum(), torch.tensor(len(targets))

    def of_new(
        self, logits: Tensor, targets: Tensor, num_new: int, task_loss: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Sum and number of scores of the first ``num_new`` rows of a training batch, from what it computed.

        Args:
            logits: of the whole batch.
            targets: of the whole batch; behind the new rows stand those that a strategy added.
            num_new: rows of the stream.
            task_loss: () of the whole batch.
        """
        if is_loss(self.kind) and num_new == len(targets):
            count = self.asked(targets)
            return -task_loss.detach().double() * count, count
        return self.score(logits[:num_new], targets[:num_new])

    def calibration(self, logits_BC: Tensor, targets_B: Tensor) -> tuple[Tensor, Tensor] | None:
        """(B,) probabilities of the answers and (B,) bool whether they are right; None without classes.

        So also before any class is known. The probability is over the classes that compete.
        """
        if self.kind != "classification" or min(logits_BC.shape[1], self._arrived) == 0:
            return None
        logits_BC, column_B = self._of_arrived(logits_BC, targets_B)
        own_BC = self.own_task(logits_BC, targets_B)
        return confidences(own_BC), right_answers(own_BC, column_B)

    def _of_arrived(self, logits_BC: Tensor, targets_B: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of classes that have come, and each target's column among them; -1 where it has none."""
        column_B = self.column_of_class[targets_B]
        if self._arrived == len(self._classes):
            return logits_BC, column_B
        return logits_BC[:, : self._arrived], column_B.masked_fill(column_B >= self._arrived, -1)


def check_shape(answers: Tensor, targets: Tensor) -> None:
    """Refuse answers that are not as many numbers as were asked for, in the same shape.

    Raises:
        InputError: names both shapes.
    """
    if answers.shape != targets.shape:
        raise InputError(
            got=f"a model that answers {list(answers.shape)} for targets of shape {list(targets.shape)}",
            allowed="an answer of exactly the targets' shape: a number for each number",
            key="model (or stream)",
        )


def add_terms(terms: dict[str, Tensor], more: Mapping[str, Tensor]) -> None:
    """Terms of one name add up: several layers balance their load, a strategy may stand twice."""
    for name, value in more.items():
        terms[name] = terms[name] + value if name in terms else value


def _squares(answers: Tensor, targets: Tensor) -> Tensor:
    """Squared errors, float64, of the targets' shape."""
    check_shape(answers, targets)
    return (answers.double() - targets.double()).square()


def _window_losses(logits_BSV: Tensor, targets_BS: Tensor) -> Tensor:
    flat = F.cross_entropy(
        wide(logits_BSV.flatten(0, 1)), targets_BS.flatten(), ignore_index=IGNORE, reduction="none"
    )
    asked_BS = targets_BS != IGNORE
    return flat.double().view_as(targets_BS).sum(dim=1) / asked_BS.sum(dim=1)
