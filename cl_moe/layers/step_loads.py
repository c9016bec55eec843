"""Loads of an optimizer step, for layers that balance without a loss.

Legend: N experts of a layer.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import torch
from torch import Tensor

from cl_moe.layers.expert_layer import ExpertLayer
from cl_moe.layers.ranks import sum_over_ranks
from cl_moe.layers.routing import Routing, fold_load


class StepLoads:
    """Adds up what the batches of one step routed, and hands it to the layers once (2408.15664).

    Kept by who trains, not by the layers: a forward pass may run twice for one step. It is empty between two
    steps, so a checkpoint there needs nothing of it.
    """

    def __init__(self) -> None:
        self._counts: dict[Hashable, Tensor] = {}

    @torch.no_grad()
    def add(self, layers: Mapping[int, ExpertLayer], routings: Mapping[int, Routing]) -> None:
        """Note one batch of the step: the layers, and their routings under the same names."""
        for name, routing in routings.items():
            if name in layers and layers[name].wants_load:
                count_N = fold_load(routing).count
                self._counts[name] = self._counts[name] + count_N if name in self._counts else count_N

    @torch.no_grad()
    def apply(self, layers: Mapping[int, ExpertLayer]) -> None:
        """Once per optimizer step, on every rank: ``after_step`` of the layers that want it; then forget."""
        for name, layer in layers.items():
            if layer.wants_load:
                nothing_N = torch.zeros(
                    layer.num_experts, dtype=torch.int64, device=next(layer.parameters()).device
                )
                layer.after_step(sum_over_ranks(self._counts.get(name, nothing_N)))
        self._counts = {}
