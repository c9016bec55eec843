"""What every model promises, and the head that grows with the classes.

Legend: B batch, D width, C columns of logits (classes known so far).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from cl_moe.layers.expert_layer import ExpertLayer
from cl_moe.layers.routing import Routing
from cl_moe.stream import Kind


class Head(nn.Module):
    """A linear read-out made of cohorts of rows: one cohort per group of classes that arrived together.

    A cohort is a whole parameter, so old rows can be frozen and never move (law 1, law 2). Columns of the
    logits stand in order of arrival; ``classes`` names them. Rows may be there ahead of their classes: those
    columns are the last, ``ahead`` names them, and an evaluation leaves them out.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.cohorts = nn.ModuleList()
        self.classes: list[int] = []
        self.ahead: list[int] = []

    @property
    def arrived(self) -> list[int]:
        """Classes that have come: those of the first columns."""
        return self.classes[: len(self.classes) - len(self.ahead)]

    @property
    def num_arrived_cohorts(self) -> int:
        """Cohorts of rows whose classes have come."""
        ends = torch.tensor([0, *(c.out_features for c in self.cohorts)]).cumsum(0)
        return int((ends[1:] <= len(self.arrived)).sum())

    def forward(self, x: Tensor) -> Tensor:
        """Logits (..., C) of ``x`` (..., D); C is 0 before the first class arrives."""
        if not self.cohorts:
            return x.new_zeros(*x.shape[:-1], 0)
        if len(self.cohorts) == 1:
            return self.cohorts[0](x)
        # One product over all rows: a tenth of the features' size, so copying rows is cheaper than a product
        # for each cohort.
        rows: list[nn.Linear] = list(self.cohorts)  # type: ignore[arg-type]
        return F.linear(x, torch.cat([r.weight for r in rows]), torch.cat([r.bias for r in rows]))

    def grow(self, classes: Sequence[int], ahead: bool = False) -> None:
        """Append rows for new classes, drawn from torch's global generator as ``nn.Linear`` draws them.

        Args:
            classes: that come now; where their rows were there ahead of them, nothing is drawn.
            ahead: the classes are still to come.
        """
        if classes and not ahead and list(classes) == self.ahead[: len(classes)]:
            self.ahead = self.ahead[len(classes) :]
            return
        known = set(self.classes) & set(classes)
        if known or not classes:
            raise ValueError(f"classes {sorted(known)} have rows already" if known else "no classes to add")
        rows = nn.Linear(self.dim, len(classes))
        if self.cohorts:
            rows.to(next(self.cohorts[0].parameters()))
        self.cohorts.append(rows)
        self.classes.extend(classes)
        self.ahead.extend(classes if ahead else ())


class ContinualModel(nn.Module, ABC):
    """A body with feed-forward slots and a head; grown and frozen by ``growth.adapt`` only.

    Attributes:
        kind: what it can learn: ``"classification"``, ``"language"`` or ``"regression"``.
        head: the read-out, made of cohorts.
    """

    kind: Kind
    head: Head

    @abstractmethod
    def forward(
        self, inputs: Tensor, mask: Tensor | None = None, cohorts: Sequence[int] | None = None
    ) -> tuple[Tensor, dict[int, Routing]]:
        """Logits over ``head.classes``, and what each expert layer routed, by its index in ``expert_layers``.

        Of regression the answer has the targets' shape, and the head has no classes and never grows.

        Which tokens went through a block that lets only some of them through stands there too, by the block's
        ``depth_key``, a negative number: it is no choice among experts and belongs to none of their counts.

        Args:
            inputs: one batch of the stream's inputs.
            mask: language only: (B, S) bool, False on padding.
            cohorts: let every expert layer use these cohorts only.
        """

    def pose(
        self, inputs: Tensor, targets: Tensor, draw: Callable[[], torch.Generator]
    ) -> tuple[Tensor, Tensor]:
        """The inputs that the model is shown and the answers it is asked for; by default those of the stream.

        Args:
            inputs: one batch of the stream's inputs.
            targets: its targets, ``IGNORE`` on padding.
            draw: gives a generator (CPU) for what is drawn, seeded by experience and step; the same in every
                evaluation.
        """
        return inputs, targets

    @property
    @abstractmethod
    def feed_forward(self) -> Sequence[nn.Module]:
        """The layer in each block's feed-forward slot, in order of the blocks."""

    @property
    def cuts(self) -> Sequence[nn.Module]:
        """Modules whose output is all that is read behind them, the lowest first; by default none."""
        return ()

    @property
    def units_behind(self) -> Mapping[int, nn.Module]:
        """Activations that stand behind a slot of one linear map: its units, by the block's index."""
        return {}

    @property
    def expert_layers(self) -> dict[int, ExpertLayer]:
        """Layers that route, by block index: those with cohorts, which can grow and freeze."""
        return {
            index: layer
            for index, layer in enumerate(self.feed_forward)
            if isinstance(layer, ExpertLayer) and len(layer.cohorts) > 0
        }

    @property
    def depth_blocks(self) -> Sequence[int]:
        """Blocks that let only some tokens through (Mixture-of-Depths)."""
        return ()

    def active_parameters(self) -> int:
        """Parameters that take part in computing one token, on average over tokens."""
        return active_parameters(self)


def active_parameters(module: nn.Module) -> int:
    """A module's parameters without those of experts that were not chosen for a token."""
    layers = [part for part in module.modules() if isinstance(part, ExpertLayer)]
    idle = sum(sum(p.numel() for p in layer.parameters()) - layer.active_parameters() for layer in layers)
    return sum(p.numel() for p in module.parameters()) - idle


def depth_key(block: int) -> int:
    """Where a block's Mixture-of-Depths stands among the routings; its own inverse.

    >>> depth_key(0), depth_key(2), depth_key(depth_key(2))
    (-1, -3, 2)
    """
    return -1 - block
