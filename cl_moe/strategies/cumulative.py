"""Cumulative training: every experience together with all before it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from cl_moe.strategies.base import Outlook, Strategy, tensor_bytes
from cl_moe.stream import Stream, concatenate


class Cumulative(Strategy):
    """Goes on training the same model on the union of the data so far; cost grows with the stream."""

    computes = False

    def __init__(self) -> None:
        self._kept = 0

    def view(self, stream: Stream) -> Stream:
        """Experience i holds the training data of 0 .. i."""
        grown = [
            replace(e, train=concatenate([past.train for past in stream[: e.index + 1]])) for e in stream
        ]
        return replace(stream, experiences=tuple(grown))

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
