"""How large growth may make a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch

from cl_moe.errors import InputError
from cl_moe.models.base import ContinualModel

Exceeding = Literal["stop", "refuse"]


class Size(NamedTuple):
    """Of a model.

    Args:
        experts: of all layers together, frozen ones included: what ``growth/num_experts`` says.
        parameters: of the whole model.
        bytes: of its weights.
    """

    experts: int
    parameters: int
    bytes: int


class GrowthBudget:
    """Bounds on the size of a model that grows; a cohort that does not fit whole is not born.

    Args:
        experts: of all layers together; None: any number.
        parameters: of the whole model; None: any number.
        bytes: of its weights; None: any number.
        on_exceed: ``"stop"``: the cohort is not born, and the ledger says why; ``"refuse"``: a run that would
            exceed its budget is refused, before any training if its schedule is known by then.

    Raises:
        InputError: a bound that is no whole number above 0.
    """

    def __init__(
        self,
        experts: int | None = None,
        parameters: int | None = None,
        bytes: int | None = None,
        on_exceed: Exceeding = "stop",
    ) -> None:
        self.bounds = {"experts": experts, "parameters": parameters, "bytes": bytes}
        for name, bound in self.bounds.items():
            if bound is not None and (not isinstance(bound, int) or isinstance(bound, bool) or bound < 1):
                raise InputError(
                    got=f"{name}={bound!r}",
                    allowed="a whole number, at least 1, or null",
                    key=f"growth.budget.{name}",
                )
        if on_exceed not in get_args(Exceeding):
            raise InputError(
                got=f"on_exceed={on_exceed!r}", allowed="stop or refuse", key="growth.budget.on_exceed"
            )
        self.on_exceed = on_exceed

    @property
    def bounded(self) -> bool:
        """Whether there is any bound."""
        return any(bound is not None for bound in self.bounds.values())

    def exceeded(self, size: Size) -> str | None:
        """The first bound that a model of this size would exceed, as its key; None: it fits.

        >>> GrowthBudget(experts=8).exceeded(Size(experts=9, parameters=1, bytes=4))
        'experts'
        """
        over = [name for name, bound in self.bounds.items() if bound and getattr(size, name) > bound]
        return over[0] if over else None

    def refusal(self, size: Size, experience: int) -> InputError:
        """What is said of growth before an experience that would make a model of this size, or of a start."""
        name = self.exceeded(size) or "experts"
        if experience == 0:
            return InputError(
                got=f"a model of {getattr(size, name):,} {name} at its start",
                allowed=f"at most {self.bounds[name]:,}, by fewer experts or less width; or a larger budget",
                key=f"growth.budget.{name} (or layer, model)",
            )
        return InputError(
            got=f"growth to {getattr(size, name):,} {name} before experience {experience}",
            allowed=f"at most {self.bounds[name]:,}, or growth.budget.on_exceed=stop, where growth ends",
            key=f"growth.budget.{name} (or growth)",
        )


def sizes_after(
    model: ContinualModel, births: Sequence[int], hidden: int | None = None, new_classes: int = 0
) -> list[Size]:
    """The size of a model, and after each of these growths of every expert layer; nothing is grown.

    Args:
        model: as it is.
        births: experts born in each layer, one growth after the other.
        hidden: the newborns' hidden width; None: as at the start.
        new_classes: that get rows of the head first.
    """
    layers = model.expert_layers.values()
    totals = [layer.num_experts for layer in layers]
    width = next(model.parameters()).element_size()
    rows = new_classes * (model.head.dim + 1)
    parameters = sum(p.numel() for p in model.parameters()) + rows
    size_in_bytes = sum(p.numel() * p.element_size() for p in model.parameters()) + rows * width
    found = [Size(sum(totals), parameters, size_in_bytes)]
    for born in births:
        with torch.random.fork_rng(devices=[]):
            pairs = zip(layers, totals, strict=True)
            new = sum(layer.birth_parameters(born, total, hidden) for layer, total in pairs)
        totals = [total + born for total in totals]
        parameters, size_in_bytes = parameters + new, size_in_bytes + new * width
        found.append(Size(sum(totals), parameters, size_in_bytes))
    return found
