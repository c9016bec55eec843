"""What a run cost so far: training seconds, examples or tokens, parameters, bytes kept by strategies."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cl_moe.learner import Learner
from cl_moe.stream import IGNORE, Experience


class CostMeter:
    """Adds up over experiences and over restarts; evaluation is not charged as training."""

    def __init__(self) -> None:
        self.tokens = 0
        self._before = 0.0  # seconds of the fits that ended
        self._start: float | None = None

    @property
    def seconds(self) -> float:
        """Training time so far, the fit that is running included."""
        running = 0.0 if self._start is None else time.perf_counter() - self._start
        return self._before + running

    @contextmanager
    def training(self, experience: Experience, epochs: int) -> Iterator[None]:
        """Time one fit. Tokens are real target positions; in classification an example counts as one."""
        self._start = time.perf_counter()
        yield
        self._before, self._start = self.seconds, None
        self.tokens += epochs * int((experience.train.tensors[1] != IGNORE).sum())

    def points(self, learner: Learner) -> dict[str, float]:
        """The ``cost/*`` metrics of now."""
        parameters = list(learner.model.parameters())
        points: dict[str, float] = {
            "cost/seconds": self.seconds,
            "cost/params_total": sum(p.numel() for p in parameters),
            "cost/params_trainable": sum(p.numel() for p in parameters if p.requires_grad),
            "cost/buffer_bytes": sum(s.buffer_bytes for s in learner.strategies.values()),
        }
        for strategy in learner.strategies.values():
            points |= strategy.costs(learner.model)
        if self.seconds > 0:
            points["cost/tokens_per_second"] = self.tokens / self.seconds
        return points

    def state_dict(self) -> dict[str, Any]:
        """Sums so far."""
        return {"seconds": self.seconds, "tokens": self.tokens}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from sums of an earlier process."""
        self._before, self.tokens = state["seconds"], state["tokens"]
