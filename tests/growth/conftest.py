"""Small models and streams that grow."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from cl_moe.growth import Census, FreezePolicy, GrowthSchedule
from cl_moe.growth.adapt import Event, adapt, take_census
from cl_moe.layers import PEER, PKM, DenseFFN, MoE, Switch, TopK
from cl_moe.models import ContinualModel, MLPClassifier
from cl_moe.seeds import generator, seeded
from cl_moe.stream import Experience, Stream

LAYERS = {
    "moe": partial(MoE, num_experts=4, hidden=8, router=partial(TopK, k=2)),
    "switch": partial(MoE, num_experts=4, hidden=8, router=Switch),
    "peer": partial(PEER, num_experts=16, heads=2, k=4, key_dim=8),
    "pkm": partial(PKM, num_experts=16, heads=2, k=4, key_dim=8),
    "dense": DenseFFN,
}

NewModel = Callable[..., ContinualModel]
Grow = Callable[..., list[Event]]


@pytest.fixture
def new_model() -> NewModel:
    """A fresh model from an init seed, without head rows."""

    def build(layer: str, seed: int = 0, num_blocks: int = 1, slots: str = "all") -> MLPClassifier:
        with seeded(seed, "init"):
            return MLPClassifier((6,), 6, LAYERS[layer], width=16, num_blocks=num_blocks, slots=slots)

    return build


@pytest.fixture
def grow() -> Grow:
    """Adapt a model before experiences ``0 .. through`` without training; returns the ledger."""

    def run(
        model: ContinualModel, schedule: GrowthSchedule, policy: FreezePolicy, through: int = 3, seed: int = 0
    ) -> list[Event]:
        ledger: list[Event] = []
        for experience in range(through + 1):
            loads = {
                index: torch.arange(layer.num_experts).double()
                for index, layer in model.expert_layers.items()
                if experience
            }
            census: Census = take_census(model, experience, ledger, loads)
            classes = (2 * experience, 2 * experience + 1)
            ledger += adapt(model, census, schedule, policy, classes, seed)
        return ledger

    return run


@pytest.fixture
def blobs() -> Stream:
    """Three class-incremental experiences of two separable classes each."""

    def data(experience: int, rows: int, part: str) -> TensorDataset:
        draw = generator(7, experience, part)
        targets = torch.arange(rows) % 2 + 2 * experience
        centres = torch.randn(6, 6, generator=generator(7, "centres")) * 2
        return TensorDataset(centres[targets] + torch.randn(rows, 6, generator=draw) / 2, targets)

    experiences = [
        Experience(i, f"e{i}", data(i, 32, "train"), data(i, 16, "test"), (2 * i, 2 * i + 1))
        for i in range(3)
    ]
    return Stream("blobs", "classification", "class", tuple(experiences), 6, (6,))


@pytest.fixture
def snapshot() -> Callable[[ContinualModel], dict[str, bytes]]:
    """The bytes of everything in a model's state dict, by name."""

    def take(model: ContinualModel) -> dict[str, bytes]:
        state: dict[str, Tensor] = model.state_dict()
        return {name: value.detach().contiguous().numpy().tobytes() for name, value in state.items()}

    return take
