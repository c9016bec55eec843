"""Joint training: all data at once, the upper end of a class-incremental comparison."""

from __future__ import annotations

from dataclasses import replace

from torch.utils.data import TensorDataset

from cl_moe.strategies.memory import KeepsAll
from cl_moe.stream import Stream, concatenate, take


class Joint(KeepsAll):
    """Trains on the union of all experiences in place of the first; the others bring nothing to train on.

    The run keeps its T + 1 rows, so its curves lie beside the other arms'; rows after the first are equal.
    """

    def view(self, stream: Stream) -> Stream:
        """Everything in experience 0, nothing afterwards."""
        everything = replace(
            stream[0],
            train=concatenate([experience.train for experience in stream]),
            classes=tuple(label for group in stream.class_groups for label in group),
        )
        emptied = [replace(e, train=_nothing(e.train), classes=()) for e in stream[1:]]
        return replace(stream, experiences=(everything, *emptied))


def _nothing(data: TensorDataset) -> TensorDataset:
    return take(data, data.tensors[0].new_empty(0).long())
