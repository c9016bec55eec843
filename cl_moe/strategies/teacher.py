"""The model as it was at the last boundary, without a second model.

A teacher keeps the old values of parameters and statistics that can still change, and runs the grown model
with them: old cohorts only, the head's old columns only. Frozen tensors are shared with the living model, but
where that lies in pieces on several ranks: there, each rank has a model of its own for it.

Legend: B batch, C columns of logits, V vocabulary.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.func import functional_call

from cl_moe import agreement
from cl_moe.errors import InputError
from cl_moe.layers.precision import wide
from cl_moe.losses import distillation_loss
from cl_moe.models.base import ContinualModel
from cl_moe.models.rewind import candidates, pruned_in
from cl_moe.strategies.base import Outlook, Step, Strategy, tensor_bytes
from cl_moe.stream import IGNORE


class Teacher:
    """Old values, how many cohorts and head columns were there, and which cohorts were no candidates."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}
        self.device = torch.device("cpu")
        self.num_classes = 0
        self.num_cohorts: int | None = None
        self.pruned: dict[int, tuple[int, ...]] = {}
        self.body: ContinualModel | None = None

    def __bool__(self) -> bool:
        return self.num_classes > 0

    def learn(self, model: ContinualModel) -> None:
        """Remember the model as it is now."""
        still = set(still_names(model))
        self.values = {
            name: value.detach().clone() for name, value in model.state_dict().items() if name not in still
        }
        self.num_classes = len(model.head.arrived)
        sizes = {len(layer.cohorts) for layer in model.expert_layers.values()}
        if len(sizes) > 1:
            raise ValueError(f"expert layers with different numbers of cohorts: {sorted(sizes)}")
        self.num_cohorts, self.pruned = sizes.pop() if sizes else None, pruned_in(model)

    @torch.no_grad()
    def logits(self, model: ContinualModel, inputs: Tensor, mask: Tensor | None) -> Tensor:
        """The old model's logits (B, C_old) or (B, S, V), dropout off and running statistics used."""
        model = model if self.body is None else self.body
        training = [part for part in model.modules() if part.training]
        for part in training:
            part.training = False
        try:
            with candidates(model, self.num_cohorts or 0, self.pruned) as cohorts:
                options = {"mask": mask, "cohorts": cohorts}
                logits, _ = functional_call(model, self.values, (inputs,), options, strict=False)
        finally:
            for part in training:
                part.training = True
        return logits[..., : self.num_classes]

    def state_dict(self) -> dict[str, Any]:
        """Old values and counts."""
        counts = {"num_classes": self.num_classes, "num_cohorts": self.num_cohorts, "pruned": self.pruned}
        return {"values": self.values, **counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take old values and counts back."""
        self.values = dict(state["values"])
        self.num_classes, self.num_cohorts = state["num_classes"], state["num_cohorts"]
        self.pruned = dict(state.get("pruned", {}))
        self.to(self.device)

    def meet(self, model: ContinualModel) -> None:
        """An experience begins, with this model: bring the old values to where it computes."""
        self.body = copy.deepcopy(model) if self and agreement.in_pieces() else None
        self.to(next(model.parameters()).device)

    def to(self, device: torch.device) -> None:
        """Move the old values."""
        self.device = device
        self.values = {name: value.to(device) for name, value in self.values.items()}


def still_names(model: nn.Module) -> Iterator[str]:
    """Names of what will never change again: frozen parameters, and statistics that were stopped."""
    yield from (name for name, parameter in model.named_parameters() if not parameter.requires_grad)
    for prefix, part in model.named_modules():
        if getattr(part, "statistics_frozen", False):
            yield from (f"{prefix}.{name}" for name, _ in part.named_buffers(recurse=False))


def distill(
    step: Step,
    old_logits: Tensor,
    temperature: float,
    group_of_class: Tensor | None = None,
    trained: Sequence[int] = (),
) -> Tensor:
    """KL from the teacher to the student over the columns the teacher knows; per task where heads are tasks'.

    Padding is left out. In the task-incremental scenario (``group_of_class``) the columns of each task that
    was trained (it holds one of the classes ``trained``) are a distribution of their own (LwF's multi-head
    form), and the tasks' terms add up. The rows of tasks to come exist already, but know nothing yet.
    """
    known = old_logits.shape[-1]
    new_logits = wide(step.logits[..., :known])
    old_logits = wide(old_logits)
    # No padding; and of what a masked language model answers, only what was hidden.
    asked = step.targets != IGNORE if step.targets.dim() > 1 else step.mask
    if asked is not None and not asked.all():
        new_logits, old_logits = new_logits[asked], old_logits[asked]
    if group_of_class is None:
        return distillation_loss(new_logits, old_logits, temperature)
    task_of_column = group_of_class[step.model.head.classes[:known]]
    terms = []
    for task in group_of_class[list(trained)].unique():
        columns = (task_of_column == task).nonzero().squeeze(1).to(new_logits.device)
        terms.append(distillation_loss(new_logits[:, columns], old_logits[:, columns], temperature))
    return torch.stack(terms).sum()


class DistillingStrategy(Strategy):
    """What LwF and Lifelong-MoE share: a teacher learnt at each boundary, and its term.

    Args:
        strength: weight of the term.
        temperature: T; the term is ``T^2 * KL(teacher || student)`` of distributions softened by T.
    """

    cost_varies = False  # the model's, where its own varies
    needs_past = True
    reads_batches = True

    def __init__(self, strength: float, temperature: float) -> None:
        self.strength, self.temperature = strength, temperature
        self.teacher = Teacher()
        self.trained: list[int] = []  # classes
        self.group_of_class: Tensor | None = None

    def begin(self, outlook: Outlook) -> None:
        """Note the scenario's groups of classes; bring the teacher to where the model is."""
        self.group_of_class = outlook.group_of_class
        self.teacher.meet(outlook.model)

    def distillation(self, step: Step) -> Tensor | None:
        """Strength x KL(teacher || student), or None before there is a teacher."""
        if not self.teacher:
            return None
        old_logits = self.teacher.logits(step.model, step.inputs, step.mask)
        return self.strength * distill(step, old_logits, self.temperature, self.group_of_class, self.trained)

    def end(self, outlook: Outlook) -> None:
        """Today's model is tomorrow's teacher."""
        self.teacher.learn(outlook.model)
        self.trained += [label for label in outlook.experience.classes if label not in self.trained]

    def state_dict(self) -> dict[str, Any]:
        """The teacher, and which classes it was trained on."""
        return {**self.teacher.state_dict(), "trained": self.trained}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the teacher back."""
        self.teacher.load_state_dict(state)
        self.trained = list(state["trained"])

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the teacher's own values."""
        return tensor_bytes(*self.teacher.values.values())


def check_weight(value: float, key: str, above: bool = False) -> None:
    """Refuse what is no number of 0 or more, or, with ``above``, no number above 0."""
    number = isinstance(value, int | float) and math.isfinite(value)
    if not number or value < 0 or (above and value == 0):
        raise InputError(got=f"{value!r}", allowed=f"a number {'above' if above else '>='} 0", key=key)


def squared_distance(module: nn.Module, values: dict[str, Tensor]) -> Tensor:
    """Sum of squared differences between learning parameters and their old values."""
    terms = [
        F.mse_loss(parameter, values[name], reduction="sum")
        for name, parameter in module.named_parameters()
        if parameter.requires_grad and name in values
    ]
    return torch.stack(terms).sum() if terms else torch.zeros(())
