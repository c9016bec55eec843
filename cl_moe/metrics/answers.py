"""Scores of a batch, and their sum over batches that pass by once.

Legend: B batch, S positions, C columns of logits, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from cl_moe.layers.precision import wide
from cl_moe.stream import ASKED, IGNORE


def token_score(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Sum (float64) and number of the scores of real tokens: minus the loss of each, in nats.

    Args:
        logits: (B, S, V).
        targets: (B, S) int64, ``IGNORE`` on padding.
    """
    flat = targets.flatten()
    loss = F.cross_entropy(wide(logits.flatten(0, 1)), flat, ignore_index=IGNORE, reduction="none")
    return -loss.double().sum(), (flat != IGNORE).sum()


def last_words_right(logits: Tensor, targets: Tensor, ends_V: Tensor) -> tuple[Tensor, Tensor]:
    """How many passages' last words the model would write, and of how many (Paperno et al. 2016).

    Under the right beginning the most probable token is, at each place of the word, the word's: that is what
    greedy completion writes. Behind it the most probable token must end the word, so that ``cat`` is not
    found in ``catalogue``; the evaluation harness of Gao et al. leaves that out.

    Args:
        logits: (B, S, V).
        targets: (B, S) int64, ``IGNORE`` on padding, those of the word ``ASKED`` higher, the one behind it
            twice that (see ``HeldOut``).
        ends_V: (V,) bool, whether a token ends a word.
    """
    written_BS = logits.argmax(dim=2)
    part_BS = targets.div(ASKED, rounding_mode="floor")
    same_BS = written_BS == targets - ASKED
    ends_BS = ends_V.to(logits.device)[written_BS]
    right_BS = torch.where(part_BS == 1, same_BS, ends_BS) | (part_BS < 1)
    return right_BS.all(dim=1).double().sum(), torch.tensor(len(targets))


def right_answers(logits_BC: Tensor, column_B: Tensor) -> Tensor:
    """(B,) bool: whether the largest logit is that of the target's column; -1: of none, so never."""
    if logits_BC.shape[1] == 0:
        return torch.zeros_like(column_B, dtype=torch.bool)
    return logits_BC.argmax(dim=1) == column_B


def confidences(logits_BC: Tensor) -> Tensor:
    """(B,) float64: the probability that the softmax gives the answer."""
    return logits_BC.detach().double().softmax(dim=1).amax(dim=1)


class OnlineScore:
    """Mean score of what is seen for the first time, before it is learnt from (prequential: Dawid 1984).

    Sums stay where the model computes: nothing waits for a number.
    """

    def __init__(self) -> None:
        self._total: Tensor | float = 0.0
        self._count: Tensor | int = 0

    def reset(self) -> None:
        """An experience begins."""
        self._total, self._count = 0.0, 0

    def add(self, total: Tensor, count: Tensor | int) -> None:
        """Take up a batch: sum and number of its scores."""
        self._total = self._total + total.detach().double()
        self._count = self._count + count

    @property
    def mean(self) -> float:
        """Right answers as a share, or minus the mean loss; NaN where nothing was seen."""
        return mean_of([self.state_dict()])

    def state_dict(self) -> dict[str, Any]:
        """Plain Python: both sums are whole in 64 bits."""
        return {"total": float(self._total), "count": int(self._count)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` gave."""
        self._total, self._count = state["total"], state["count"]


def mean_of(states: Sequence[Mapping[str, Any]]) -> float:
    """The mean over what several ``OnlineScore`` took up; NaN where nothing was seen."""
    count = sum(state["count"] for state in states)
    return sum(state["total"] for state in states) / count if count else float("nan")
