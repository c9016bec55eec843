"""What the tests of regression share: a small stream of numbers, a model of it, and a run of both.

Legend: B batch, F features, D width, G targets of an example.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from cl_moe.checkpoint import Checkpoints
from cl_moe.growth import FreezePolicy, GrowthSchedule, NeverFreeze, NeverGrow
from cl_moe.layers import PEER, DenseFFN, MoE, Routing, TopK
from cl_moe.learner import Learner
from cl_moe.measuring import Measuring
from cl_moe.models import ContinualModel, Head
from cl_moe.optim import SGD
from cl_moe.run import Run
from cl_moe.seeds import generator, seeded
from cl_moe.strategies import Strategy
from cl_moe.stream import Experience, Stream
from cl_moe.tracking.tracker import NoTracker, Tracker
from cl_moe.trainer import TrainerSpec

LAYERS = {
    "dense": partial(DenseFFN, hidden=8),
    "moe": partial(MoE, num_experts=3, hidden=8, router=partial(TopK, k=2)),
    "peer": partial(PEER, num_experts=16, heads=2, k=4, key_dim=8),
}
FEATURES = 4


class Numbers(ContinualModel):
    """A stem, one slot and a map to G numbers, which stands in the head as rows of no class."""

    kind = "regression"

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        layer: str = "dense",
        targets: int = 1,
        in_head: bool = True,
    ) -> None:
        super().__init__()
        self.stem, self.relu = nn.Linear(input_shape[-1], 16), nn.ReLU()
        self.slot = LAYERS[layer](dim=16)
        self.head = Head(16)
        self.readout = nn.Linear(16, targets)
        if in_head:
            self.head.cohorts.append(self.readout)

    def forward(
        self, inputs: Tensor, mask: Tensor | None = None, cohorts: Sequence[int] | None = None
    ) -> tuple[Tensor, dict[int, Routing]]:
        assert mask is None, "numbers are not padded"
        x_BD = self.relu(self.stem(inputs))
        out_BD, routing = self.slot(x_BD, cohorts=cohorts)
        read = self.head if self.head.cohorts else self.readout
        return read(x_BD + out_BD), {0: routing} if routing.num_experts else {}

    @property
    def feed_forward(self) -> Sequence[nn.Module]:
        return [self.slot]

    @property
    def cuts(self) -> Sequence[nn.Module]:
        return [self.relu]


def numbers(sizes: Sequence[int] = (40, 40, 40), targets: int = 1, spread: float = 1.0) -> Stream:
    """Experiences that each have a linear map of their own; inputs of all are alike."""

    def data(index: int, rows: int, part: str) -> TensorDataset:
        inputs_BF = torch.randn(rows, FEATURES, generator=generator(5, index, part))
        map_FG = torch.randn(FEATURES, targets, generator=generator(5, index, "map"))
        return TensorDataset(inputs_BF, spread * inputs_BF @ map_FG + index)

    experiences = tuple(
        Experience(index, f"map {index}", data(index, rows, "train"), data(index, 30, "test"))
        for index, rows in enumerate(sizes)
    )
    return Stream("maps", "regression", "domain", experiences, 0, (FEATURES,))


def run_of(
    folder: Path,
    strategies: Mapping[str, Strategy] | None = None,
    layer: str = "dense",
    stream: Stream | None = None,
    growth: GrowthSchedule | None = None,
    freeze: FreezePolicy | None = None,
    tracker: Tracker | None = None,
    model: ContinualModel | None = None,
    measuring: Measuring | None = None,
    every_steps: int | None = None,
    seed: int = 0,
    **more: Any,
) -> Run:
    """A run of two passes over each experience, which nothing keeps from forgetting but its strategies."""
    stream = stream or numbers()
    if model is None:
        with seeded(seed, "init"):
            model = Numbers(stream.input_shape, 0, layer, stream[0].test.tensors[1].shape[1])
    return Run(
        stream,
        Learner(model, SGD(lr=0.03, momentum=0.5), strategies or {}, stream, seed),
        growth or NeverGrow(),
        freeze or NeverFreeze(),
        TrainerSpec(epochs=2, batch_size=8, eval_batch_size=16, accelerator="cpu"),
        tracker or NoTracker(),
        folder,
        seed_init=seed,
        seed_data=seed,
        checkpoints=Checkpoints(every_minutes=None, every_steps=every_steps),
        measuring=measuring or Measuring(),
        **more,
    )
