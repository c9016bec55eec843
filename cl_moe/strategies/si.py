"""Synaptic intelligence (Zenke, Poole & Ganguli 2017, 1703.04200)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cl_moe.models.base import ContinualModel
from cl_moe.strategies.base import Outlook, Step, Strategy, tensor_bytes
from cl_moe.strategies.importance import Anchors, add_importance, values_now
from cl_moe.strategies.passes import learning
from cl_moe.strategies.teacher import check_weight


class SI(Strategy):
    """Holds each weight to its old value as strongly as it lowered the loss on its way there.

    While an experience is trained, omega adds up ``-gradient x step`` of every weight (equation 3). After it,
    ``Omega += max(omega, 0) / ((theta_end - theta_start)^2 + damping)`` (equation 5), and the term of what
    comes next is ``strength * sum Omega (theta - theta_end)^2`` (equation 4).

    The gradient is that of the whole loss without this strategy's own term. A step is what the optimizer
    really did, whatever it was (momentum, clipping, weight decay), so old values are copies, not views of
    live weights. A negative omega (the loss rose) counts as none: as an importance it would push weights away
    without bound.

    Args:
        strength: c; the paper takes 1 for split and .1 for permuted MNIST.
        damping: xi, above 0.
    """

    cost_varies = False
    needs_past = True
    reads_batches = True

    def __init__(self, strength: float = 1.0, damping: float = 0.1) -> None:
        check_weight(strength, "strategy.si.strength")
        check_weight(damping, "strategy.si.damping", above=True)
        self.strength, self.damping = strength, damping
        self.anchors = Anchors()
        self.path: dict[str, Tensor] = {}  # omega of this experience
        self.start: dict[str, Tensor] = {}
        self._before: dict[str, Tensor] = {}  # values and gradients that the step under way began with
        self._slope: dict[str, Tensor] = {}
        self._pulls, self._accumulate = 0, 1  # batches of the step under way, of those of a whole one
        self._device = torch.device("cpu")

    def begin(self, outlook: Outlook) -> None:
        """A new path begins."""
        self._device = next(outlook.model.parameters()).device
        self.anchors.settle(outlook.model)
        self.start = values_now(outlook.model)
        self.path = {name: torch.zeros_like(value) for name, value in self.start.items()}
        self._before, self._slope = {}, {}
        self._pulls, self._accumulate = 0, outlook.accumulate

    def loss(self, step: Step) -> dict[str, Tensor]:
        """The pull to the old values, from the second experience on."""
        pull = self.anchors.penalty(step.model)
        self._pulls += 1
        return {} if pull is None else {"si": self.strength * pull}

    @torch.no_grad()
    def gradients(self, model: ContinualModel) -> None:
        """The last step has been made and the next one is due: add up the one, note the other's start."""
        self._walk(model)
        self._before, self._slope = values_now(model), {}
        # Each batch's loss is divided by those of a whole step, of which an epoch's last may have fewer:
        # scaled back, so that a short step's path counts by the loss's slope and not by a part of it.
        whole, self._pulls = self._accumulate / max(self._pulls, 1), 0
        for name, parameter in learning(model).items():
            if parameter.grad is not None:
                slope = parameter.grad * whole
                if name in self.anchors.importance:
                    away = parameter - self.anchors.values[name]
                    slope -= 2 * self.strength * self.anchors.importance[name] * away
                self._slope[name] = slope

    @torch.no_grad()
    def _walk(self, model: ContinualModel) -> None:
        for name, parameter in learning(model).items():
            if name in self._slope and name in self.path:
                self.path[name] -= self._slope[name] * (parameter - self._before[name])

    @torch.no_grad()
    def end(self, outlook: Outlook) -> None:
        """The path's end: what each weight contributed becomes its importance."""
        self._walk(outlook.model)
        values = values_now(outlook.model)
        new = {
            name: self.path[name].clamp_min(0) / ((value - self.start[name]).square() + self.damping)
            if name in self.path
            else torch.zeros_like(value)
            for name, value in values.items()
        }
        self.anchors = Anchors(add_importance(self.anchors.importance, new), values)
        self.path, self.start, self._before, self._slope = {}, {}, {}, {}

    def state_dict(self) -> dict[str, Any]:
        """Importances, and the path so far."""
        way = {"path": self.path, "start": self.start, "before": self._before, "slope": self._slope}
        return {"anchors": self.anchors.state_dict(), **way}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back; what is added to is copied first."""
        self.anchors = Anchors.from_state_dict(state["anchors"], self._device)
        way = [
            {name: value.to(self._device, copy=True) for name, value in state[part].items()}
            for part in ("path", "start", "before", "slope")
        ]
        self.path, self.start, self._before, self._slope = way

    @property
    def buffer_bytes(self) -> int:
        """Bytes of importances, old values and the path."""
        way = (self.path, self.start, self._before, self._slope)
        return self.anchors.bytes + tensor_bytes(*(value for part in way for value in part.values()))
