"""Parts of a parameter that were drawn anew: their optimizer begins anew with them.

What was remembered of the old weights can be cleared, but torch counts the steps of whole parameters, by
which Adam corrects its moments. A part that is a steps old would make ``(1 - b1^a) / sqrt(1 - b2^a)`` times
the step of a fresh parameter: up to 6.5 times for b1 = .9, b2 = .999. So the optimizer notes when each entry
began (``born``, of the parameter's shape), and a hook behind its step makes up the difference. The code of
continual backpropagation (Dohare et al. 2024) has a step count for each weight, to the same effect.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor

BORN = "born"
_FORGOTTEN = 1e-6
"""Below this share of a first step in its moments an entry is as old as any."""


@torch.no_grad()
def forget_part(state: MutableMapping[str, Any], shape: torch.Size, part: Any) -> None:
    """Forget what an optimizer remembers of a part of a parameter.

    Args:
        state: of the parameter; changed in place, and left alone while it is empty.
        shape: of the parameter.
        part: an index into it: rows, say, or ``(slice(None), column)``.
    """
    for name, value in state.items():
        if isinstance(value, Tensor) and value.shape == shape and name != BORN:
            value[part] = 0.0
    if "exp_avg" in state and state["step"].dim() == 0:
        state.setdefault(BORN, torch.zeros_like(state["exp_avg"]))[part] = state["step"].to(state["exp_avg"])


@torch.no_grad()
def correct_steps(optimizer: torch.optim.Optimizer, *args: Any) -> None:
    """Behind a step of Adam: entries that began later than their parameter step as if they were fresh.

    Their step is ``lr * m / (1 - b1^a) / (sqrt(v / (1 - b2^a)) + eps)`` at an age of a steps (1412.6980,
    algorithm 1); torch has made it with the parameter's age.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if BORN not in state or parameter.grad is None:
                continue
            age = state["step"].to(state[BORN]) - state[BORN]
            young = (state[BORN] > 0) & (max(group["betas"]) ** age > _FORGOTTEN)
            if not young.any():
                del state[BORN]
                continue
            moments = state["exp_avg"][young], state["exp_avg_sq"][young]
            made = _step(*moments, state["step"].to(age), group)
            parameter[young] += made - _step(*moments, age[young], group)


def _step(mean: Tensor, square: Tensor, age: Tensor, group: dict[str, Any]) -> Tensor:
    """What is taken from the weights."""
    (beta1, beta2), age = group["betas"], age.double()
    below = (square / (1 - beta2**age)).sqrt() + group["eps"]
    taken: Tensor = group["lr"] * (mean / (1 - beta1**age)) / below
    return taken.to(mean)
