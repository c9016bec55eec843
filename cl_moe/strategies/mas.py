"""Memory aware synapses (Aljundi et al. 2018, 1711.09601).

Legend: C columns of logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cl_moe.layers.precision import wide
from cl_moe.seeds import generator
from cl_moe.strategies.base import Outlook, Step, Strategy
from cl_moe.strategies.importance import Anchors, add_importance, check_samples, sampled_rows, values_now
from cl_moe.strategies.passes import example_gradients, learning, question_of
from cl_moe.strategies.teacher import check_weight


class MAS(Strategy):
    """Holds each weight to its old value as strongly as the model's answers hang on it; labels do not matter.

    Importance is the mean over examples of ``|d ||F(x)||^2 / d theta|`` (equations 2, 3 and the squared norm
    of section 4.1), F the logits, per example as in the paper (implementations that take a batch's mean
    gradient first measure something smaller). It adds up over experiences, and the term is ``strength * sum
    Omega (theta - theta_old)^2`` (equation 4).

    Args:
        strength: lambda. The authors' code has 1; under plain gradient descent at a rate of .1 that
            overshoots where importances pass 10, as they do on split digits.
        samples: training examples that importance is measured on; None for all. For language an example is a
            sequence, and its squared norm the mean over its tokens.
    """

    cost_varies = False
    needs_past = True

    def __init__(self, strength: float = 0.1, samples: int | None = None) -> None:
        check_weight(strength, "strategy.mas.strength")
        check_samples(samples, "strategy.mas.samples")
        self.strength, self.samples = strength, samples
        self.anchors = Anchors()
        self._device = torch.device("cpu")

    def begin(self, outlook: Outlook) -> None:
        """Let go of what was frozen."""
        self._device = next(outlook.model.parameters()).device
        self.anchors.settle(outlook.model)

    def loss(self, step: Step) -> dict[str, Tensor]:
        """The pull to the old values, from the second experience on."""
        pull = self.anchors.penalty(step.model)
        return {} if pull is None else {"mas": self.strength * pull}

    def end(self, outlook: Outlook) -> None:
        """Measure what today's answers hang on."""
        if not len(outlook.experience.train):
            return
        total = {name: torch.zeros_like(p) for name, p in learning(outlook.model).items()}
        rows = sampled_rows(outlook, self.samples, "mas rows")
        draw, count = generator(outlook.seed, outlook.experience.index, "mas"), 0
        question = question_of(outlook)

        def squared_norm(logits: Tensor, targets: Tensor) -> Tensor:
            if outlook.kind == "language":
                return wide(logits[targets >= 0]).square().sum(dim=-1).mean()
            own_C = wide(question.own_task(logits, targets))
            return own_C.masked_fill(own_C.isneginf(), 0.0).square().sum()  # other tasks' are not asked for

        for gradients in example_gradients(outlook, rows, draw, squared_norm):
            count += 1
            for name, gradient in gradients.items():
                total[name] += gradient.abs()
        new = {name: value / max(count, 1) for name, value in total.items()}
        self.anchors = Anchors(add_importance(self.anchors.importance, new), values_now(outlook.model))

    def state_dict(self) -> dict[str, Any]:
        """Importances and old values."""
        return {"anchors": self.anchors.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        self.anchors = Anchors.from_state_dict(state["anchors"], self._device)

    @property
    def buffer_bytes(self) -> int:
        """Bytes of importances and old values."""
        return self.anchors.bytes
