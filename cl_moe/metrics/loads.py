"""Expert loads of an evaluation, folded batch by batch and summed over ranks.

Legend: T experiences, N experts of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from cl_moe.errors import InputError
from cl_moe.layers.routing import ExpertLoad

_PARTS = ("score", "count", "kept")


class ExpertLoads(Metric):
    """Load of every expert layer on every experience's evaluation data: one entry of ``Record.loads``.

    Made anew for every evaluation: the number of experts is fixed while it lives, since a model grows only
    between evaluations, and states of fixed size can be summed over ranks.

    Args:
        num_experiences: T.
        num_experts: ``{block index: N}`` of the model as it is. None: blocks are taken up as they come, by
            ``update`` only; then every rank must see at least one batch, or they would sum different states.

    Raises:
        InputError: T below 1, or a negative N.
    """

    full_state_update = False
    is_differentiable = False

    def __init__(
        self, num_experiences: int, num_experts: Mapping[int, int] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if num_experiences < 1 or min((num_experts or {}).values(), default=0) < 0:
            raise InputError(
                got=f"num_experiences={num_experiences}, num_experts={num_experts}",
                allowed="at least 1 experience, and no negative number of experts",
                key="num_experiences, num_experts",
            )
        self.num_experiences = num_experiences
        self.fixed = num_experts is not None
        self.num_experts: dict[int, int] = {}
        for block, size in (num_experts or {}).items():
            self._take_up(block, size, torch.device("cpu"))

    def update(self, experience: int, loads: Mapping[int, ExpertLoad]) -> None:
        """Fold one batch in.

        Args:
            experience: index of the experience that the batch belongs to.
            loads: ``{block index: fold_load(routing)}`` of the batch; a block may be missing.

        Raises:
            InputError: no such experience or block, or a load of another number of experts.
        """
        if not 0 <= experience < self.num_experiences:
            raise InputError(
                got=f"experience {experience}", allowed=f"0 .. {self.num_experiences - 1}", key="experience"
            )
        for block, load in loads.items():
            if block not in self.num_experts and not self.fixed:
                self._take_up(block, load.score.numel(), load.score.device)
            if self.num_experts.get(block) != load.score.numel():
                raise InputError(
                    got=f"block {block} with {load.score.numel()} experts",
                    allowed=f"blocks and numbers of experts as in {self.num_experts}",
                    key="loads",
                )
            for part, value in zip(_PARTS, load, strict=True):
                self._state(part, block)[experience] += value

    def compute(self) -> dict[int, list[ExpertLoad]]:
        """``{block index: [load on experience 0, ...]}``, T loads of (N,); zeros where nothing was seen."""
        return {
            block: [
                ExpertLoad(*(self._state(part, block)[index] for part in _PARTS))
                for index in range(self.num_experiences)
            ]
            for block in self.num_experts
        }

    def _take_up(self, block: int, size: int, device: torch.device) -> None:
        """States of one more block: (T, N) scores and counts, (T,) kept slots."""
        T = self.num_experiences
        score_TN = torch.zeros(T, size, dtype=torch.float64, device=device)
        kept_T = torch.zeros(T, dtype=torch.int64, device=device)
        for part, start in zip(_PARTS, (score_TN, score_TN.long(), kept_T), strict=True):
            self.add_state(f"{part}_{block}", start, dist_reduce_fx="sum")
        self.num_experts[block] = size

    def _state(self, part: str, block: int) -> Tensor:
        return getattr(self, f"{part}_{block}")

    def _wrap_compute(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        """A load has one entry per expert also at N = 1, where torchmetrics would squeeze it to 0-d."""
        wrapped = super()._wrap_compute(compute)

        def unsqueezed(*args: Any, **kwargs: Any) -> dict[int, list[ExpertLoad]]:
            loads: dict[int, list[ExpertLoad]] = wrapped(*args, **kwargs)
            return {
                block: [ExpertLoad(score.reshape(-1), count.reshape(-1), kept) for score, count, kept in row]
                for block, row in loads.items()
            }

        return unsqueezed
