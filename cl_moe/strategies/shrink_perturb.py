"""Shrink and perturb (Ash & Adams 2020, "On warm-starting neural network training", 1910.08475)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cl_moe.errors import InputError
from cl_moe.models.base import ContinualModel
from cl_moe.seeds import generator
from cl_moe.strategies.base import Batch, Outlook, Setting, Strategy
from cl_moe.strategies.checks import check_beside
from cl_moe.strategies.passes import learning
from cl_moe.strategies.teacher import check_weight


class ShrinkPerturb(Strategy):
    """Before an experience, every weight that was trained becomes ``shrink * weight + noise`` (section 4).

    It restores the plasticity of a network that was trained long, at the price of what it had learnt: against
    forgetting it does nothing by itself. From the second experience on; newborn experts and head rows are
    fresh as they are, and what is frozen stays. The noise is normal with a standard deviation of ``noise``.

    Args:
        shrink: lambda, in (0, 1].
        noise: sigma, >= 0.
    """

    computes = False
    needs_past = True
    reads_batches = True

    def __init__(self, shrink: float = 0.4, noise: float = 0.01) -> None:
        if not isinstance(shrink, int | float) or not 0 < shrink <= 1:
            key = "strategy.shrink_perturb.shrink"
            raise InputError(got=f"shrink={shrink!r}", allowed="a number in (0, 1]", key=key)
        check_weight(noise, "strategy.shrink_perturb.noise")
        self.shrink, self.noise = shrink, noise
        self.trained: list[str] = []  # names of what learnt in the last experience
        self._waiting = False
        self._outlook: Outlook | None = None

    def check(self, setting: Setting) -> None:
        """Nothing remembers the weights as they were before the shrinking."""
        check_beside("shrink_perturb", setting, ("gdumb",), "starts from scratch anyway")

    def begin(self, outlook: Outlook) -> None:
        """The change waits for the first step: this may be a restart inside the experience."""
        self._outlook, self._waiting = outlook, bool(self.trained)

    def batch(self, inputs: Tensor, targets: Tensor) -> Batch:
        """The batch as it is; before the first one, the weights shrink and are shaken."""
        if self._waiting:
            assert self._outlook is not None
            self._change(self._outlook.model, self._outlook)
            self._waiting = False
        return inputs, targets

    @torch.no_grad()
    def _change(self, model: ContinualModel, outlook: Outlook) -> None:
        live = learning(model)
        for name in self.trained:
            if name in live:  # not frozen since
                draw = generator(outlook.seed, outlook.experience.index, "shrink_perturb", name)
                noise = torch.randn(live[name].shape, generator=draw).to(live[name])
                live[name].mul_(self.shrink).add_(self.noise * noise)

    def end(self, outlook: Outlook) -> None:
        """Note what was trained."""
        self.trained = list(learning(outlook.model))

    def state_dict(self) -> dict[str, Any]:
        """What was trained, and whether this experience has changed it yet."""
        return {"trained": self.trained, "waiting": self._waiting}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take that back."""
        self.trained, self._waiting = list(state["trained"]), state["waiting"]
