"""Joint training: all data at once, the upper end of a class-incremental comparison."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch.utils.data import TensorDataset

from cl_moe.strategies.base import Outlook, Strategy, tensor_bytes
from cl_moe.stream import Stream, concatenate, take


class Joint(Strategy):
    """Trains on the union of all experiences in place of the first; the others bring nothing to train on.

    The run keeps its T + 1 rows, so its curves lie beside the other arms'; rows after the first are equal.
    """

    computes = False

    def __init__(self) -> None:
        self._kept = 0

    def view(self, stream: Stream) -> Stream:
        """Everything in experience 0, nothing afterwards."""
        everything = replace(
            stream[0],
            train=concatenate([experience.train for experience in stream]),
            classes=tuple(label for group in stream.class_groups for label in group),
        )
        emptied = [replace(e, train=_nothing(e.train), classes=()) for e in stream[1:]]
        return replace(stream, experiences=(everything, *emptied))

    def end(self, outlook: Outlook) -> None:
        """All that was trained on is kept."""
        if len(outlook.experience.train):
            self._kept = tensor_bytes(*outlook.experience.train.tensors)

    def state_dict(self) -> dict[str, Any]:
        """How much that is."""
        return {"kept": self._kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take that back."""
        self._kept = state["kept"]

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the data so far."""
        return self._kept


def _nothing(data: TensorDataset) -> TensorDataset:
    return take(data, data.tensors[0].new_empty(0).long())
