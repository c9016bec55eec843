"""Cumulative training: every experience together with all before it."""

from __future__ import annotations

from dataclasses import replace

from cl_moe.strategies.base import Setting
from cl_moe.strategies.checks import check_beside
from cl_moe.strategies.memory import KeepsAll
from cl_moe.stream import Stream, concatenate

MEMORIES = ("replay", "der", "gem", "agem", "icarl", "latent_replay", "router_replay")


class Cumulative(KeepsAll):
    """Goes on training the same model on the union of the data so far; cost grows with the stream."""

    needs_past = True

    def check(self, setting: Setting) -> None:
        """The past is in the data already."""
        check_beside("cumulative", setting, MEMORIES, "keeps a part of what is trained on in whole")

    def view(self, stream: Stream) -> Stream:
        """Experience i holds the training data of 0 .. i."""
        grown = [
            replace(e, train=concatenate([past.train for past in stream[: e.index + 1]])) for e in stream
        ]
        return replace(stream, experiences=tuple(grown))
