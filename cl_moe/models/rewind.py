"""The same model with its router as it was: for telling what weights forgot from what routing forgot.

Legend: B batch, S positions, C columns of logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from cl_moe.layers.router_parts import router_names
from cl_moe.models.base import ContinualModel, Head


@dataclass(frozen=True)
class RouterState:
    """All that chooses, at one moment: router parameters and statistics, and how much there was to choose of.

    Args:
        values: by name as in ``state_dict``, on the CPU.
        num_cohorts: of every expert layer; 0 for a model without experts.
        num_head_cohorts: groups of classes that had come, and had head rows.
        pruned: by expert layer, cohorts that were no candidates any more; layers without any are left out.
    """

    values: Mapping[str, Tensor]
    num_cohorts: int
    num_head_cohorts: int
    pruned: Mapping[int, Sequence[int]] = field(default_factory=dict)

    @classmethod
    def of(cls, model: ContinualModel, before: RouterState | None = None) -> RouterState:
        """That of a model as it is now; what did not change since ``before`` is shared, not copied."""
        live, known = model.state_dict(), {} if before is None else before.values
        values = {}
        for name in router_names(model):
            value = live[name].detach().cpu()
            same = name in known and torch.equal(known[name], value)
            values[name] = known[name] if same else value.clone()
        return cls(values, _num_cohorts(model), model.head.num_arrived_cohorts, pruned_in(model))

    def is_of(self, model: ContinualModel) -> bool:
        """Whether the model still chooses like this, of as many cohorts and classes."""
        now = RouterState.of(model, self)
        counts = (self.num_cohorts, self.num_head_cohorts, self.pruned)
        return (now.num_cohorts, now.num_head_cohorts, now.pruned) == counts and all(
            now.values[name] is value for name, value in self.values.items()
        )

    @torch.no_grad()
    def logits(
        self,
        model: ContinualModel,
        inputs: Tensor,
        mask: Tensor | None = None,
        cohorts: Sequence[int] | None = None,
    ) -> Tensor:
        """(B, C) or (B, S, C) of the model with this router, without what was born later (FORMULAS 2).

        Experts, trunk and head rows are those of now; cohorts and head rows born since are left out, so C
        counts the classes known then. The model itself is as before at any moment at which anything else
        runs, also after an error: the old values stand in for the time of one forward pass.

        Args:
            model: the one that this was taken of, grown or not.
            inputs: one batch, as the model's ``forward`` takes it.
            mask: language only: (B, S) bool, False on padding.
            cohorts: let every expert layer use these cohorts only; of those born since, none.
        """
        device = next(model.parameters()).device
        values = {name: value.to(device) for name, value in self.values.items()}
        among = candidates(model, self.num_cohorts, self.pruned)
        with _first_rows(model.head, self.num_head_cohorts), among as everyone:
            asked = [cohort for cohort in cohorts or () if cohort < self.num_cohorts]
            options = {"mask": mask, "cohorts": asked or everyone}
            logits, _ = functional_call(model, values, (inputs,), options, strict=False)
        return logits

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain Python only; tensors that states share are written once into one file."""
        return {**vars(self), "values": dict(self.values)}


def pruned_in(model: ContinualModel) -> dict[int, tuple[int, ...]]:
    """The pruned cohorts of each expert layer that has any."""
    return {i: layer.pruned_cohorts for i, layer in model.expert_layers.items() if layer.pruned_cohorts}


@contextmanager
def candidates(
    model: ContinualModel, num_cohorts: int, pruned: Mapping[int, Sequence[int]]
) -> Iterator[Sequence[int] | None]:
    """Let a model choose among the cohorts that it chose among once; yields those to ask every layer for.

    None, no layer in particular, where nothing was born: the very computation of an evaluation, to its bits.
    And where cohorts were pruned, in each layer others: then it is the layers that leave out what was no
    candidate.

    Args:
        model: as before afterwards, also after an error.
        num_cohorts: of every expert layer then.
        pruned: then, as ``pruned_in`` tells them.
    """
    if not pruned and not pruned_in(model):
        yield range(num_cohorts) if num_cohorts < _num_cohorts(model) else None
        return
    changed = []
    for index, layer in model.expert_layers.items():
        now, gone = layer.pruned_cohorts, pruned.get(index, ())
        for place, cohort in enumerate(layer.cohorts):
            if (was := place in now) != (out := place >= num_cohorts or place in gone):
                changed.append((cohort, was))
                cohort.pruned = out  # type: ignore[assignment]
    try:
        yield None
    finally:
        for cohort, was in changed:
            cohort.pruned = was  # type: ignore[assignment]


@contextmanager
def _first_rows(head: Head, num_cohorts: int) -> Iterator[None]:
    """A head without its younger rows: the same product as then, to its bits. Without classes none is."""
    cohorts, classes = head.cohorts, head.classes
    if num_cohorts == len(cohorts) or not classes:
        yield
        return
    old: list[nn.Linear] = list(cohorts)[:num_cohorts]  # type: ignore[assignment]
    try:
        head.cohorts = nn.ModuleList(old)
        head.classes = classes[: sum(rows.out_features for rows in old)]
        yield
    finally:
        head.cohorts, head.classes = cohorts, classes


def _num_cohorts(model: ContinualModel) -> int:
    """Cohorts of the expert layers, which grow together."""
    counts = {len(layer.cohorts) for layer in model.expert_layers.values()}
    if len(counts) > 1:
        raise ValueError(f"expert layers with different numbers of cohorts: {sorted(counts)}")
    return counts.pop() if counts else 0
