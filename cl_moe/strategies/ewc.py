"""Elastic weight consolidation (Kirkpatrick et al. 2017, 1612.00796), separate and online (1805.06370).

Legend: C columns of logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cl_moe.errors import InputError
from cl_moe.layers.precision import wide
from cl_moe.seeds import generator
from cl_moe.strategies.base import Outlook, Setting, Step, Strategy
from cl_moe.strategies.checks import check_probabilities
from cl_moe.strategies.importance import Anchors, check_samples, sampled_rows, values_now
from cl_moe.strategies.passes import Score, example_gradients, learning, question_of
from cl_moe.strategies.teacher import check_weight

LABELS = ("data", "model")


class EWC(Strategy):
    """Holds each weight to its old value as strongly as the Fisher information says that it matters.

    The term is ``strength / 2 * sum F (theta - theta_old)^2`` (1612.00796, equation 3; Avalanche leaves out
    the half). F is the diagonal of the Fisher information: the mean over examples of the squared gradient of
    each example's own log-likelihood, in float32, measured after an experience (of a batch's mean gradient it
    would be another, smaller thing).

    Separate (the paper's): a term for every past experience, with its own F and old values; memory grows.
    ``online`` (Schwarz et al. 2018, 1805.06370, equation 9): one F* = gamma F* + F, and the newest values.

    Args:
        strength: lambda.
        online: one running term instead of one for each experience.
        gamma: how much of the running F* is kept, with ``online``; in [0, 1].
        labels: whose log-likelihood: of the ``"data"``'s labels (the empirical Fisher information), or of
            labels drawn from the ``"model"``'s own answers.
        samples: training examples that F is measured on; None for all. For language an example is a
            sequence, and its log-likelihood the mean over its tokens.
    """

    cost_varies = False
    needs_past = True

    def __init__(
        self,
        strength: float = 100.0,
        online: bool = False,
        gamma: float = 1.0,
        labels: str = "data",
        samples: int | None = None,
    ) -> None:
        check_weight(strength, "strategy.ewc.strength")
        check_weight(gamma, "strategy.ewc.gamma")
        check_samples(samples, "strategy.ewc.samples")
        if gamma > 1:
            raise InputError(got=f"gamma={gamma}", allowed="0 .. 1", key="strategy.ewc.gamma")
        if labels not in LABELS:
            raise InputError(got=f"labels={labels}", allowed=", ".join(LABELS), key="strategy.ewc.labels")
        self.strength, self.online, self.gamma = strength, online, gamma
        self.labels, self.samples = labels, samples
        self.anchors: list[Anchors] = []
        self._device = torch.device("cpu")

    def check(self, setting: Setting) -> None:
        """The Fisher information is of a likelihood."""
        check_probabilities("ewc", setting.stream)

    def begin(self, outlook: Outlook) -> None:
        """Let go of what was frozen."""
        self._device = next(outlook.model.parameters()).device
        for anchors in self.anchors:
            anchors.settle(outlook.model)

    def loss(self, step: Step) -> dict[str, Tensor]:
        """The pull to the old values, from the second experience on."""
        pulls = [pull for anchors in self.anchors if (pull := anchors.penalty(step.model)) is not None]
        return {"ewc": self.strength / 2 * torch.stack(pulls).sum()} if pulls else {}

    def end(self, outlook: Outlook) -> None:
        """Measure the Fisher information of what was just learnt."""
        if not len(outlook.experience.train):
            return
        fisher, values = self.fisher(outlook), values_now(outlook.model)
        if self.online:
            old = self.anchors[0].importance if self.anchors else {}
            for name in fisher.keys() & old.keys():
                fisher[name] += self.gamma * old[name]
            self.anchors = [Anchors(fisher, values)]
        else:
            self.anchors.append(Anchors(fisher, values))

    def fisher(self, outlook: Outlook) -> dict[str, Tensor]:
        """The diagonal of the Fisher information by name, float32 or wider, >= 0."""
        total = {name: torch.zeros_like(p) for name, p in learning(outlook.model).items()}
        rows = sampled_rows(outlook, self.samples, "ewc rows")
        draw, count = generator(outlook.seed, outlook.experience.index, "ewc"), 0
        score = question_of(outlook).task_loss if self.labels == "data" else self._surprise(outlook, draw)
        for gradients in example_gradients(outlook, rows, draw, score):
            count += 1
            for name, gradient in gradients.items():
                total[name] += gradient.square()
        return {name: value / max(count, 1) for name, value in total.items()}

    @staticmethod
    def _surprise(outlook: Outlook, draw: torch.Generator) -> Score:
        """Minus the mean log-likelihood of labels drawn from the answers."""
        question = question_of(outlook)

        def score(logits: Tensor, targets: Tensor) -> Tensor:
            asked = targets >= 0
            own = logits if logits.dim() > 2 else question.own_task(logits, targets)
            logs_C = wide(own[asked]).log_softmax(dim=-1)
            drawn = torch.multinomial(logs_C.detach().exp().cpu(), 1, generator=draw).to(logs_C.device)
            return -logs_C.gather(-1, drawn).mean()

        return score

    def state_dict(self) -> dict[str, Any]:
        """Information and old values, experience by experience."""
        return {"anchors": [anchors.state_dict() for anchors in self.anchors]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        self.anchors = [Anchors.from_state_dict(one, self._device) for one in state["anchors"]]

    @property
    def buffer_bytes(self) -> int:
        """Bytes of information and old values."""
        return sum(anchors.bytes for anchors in self.anchors)
