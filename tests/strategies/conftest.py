"""A small stream, models with every layer, and the loop of an experiment without its tracker."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import pytest
import torch
from torch.utils.data import TensorDataset

from cl_moe.batches import training_loader
from cl_moe.growth import EveryExperience, FreezePolicy, GrowthSchedule, NeverFreeze, NeverGrow
from cl_moe.growth.adapt import adapt, add_classes, take_census
from cl_moe.layers import PEER, DenseFFN, MoE, TopK
from cl_moe.learner import Learner
from cl_moe.models import ContinualModel, MLPClassifier
from cl_moe.optim import SGD
from cl_moe.seeds import generator, seeded
from cl_moe.strategies import Outlook, Strategy
from cl_moe.stream import Experience, Scenario, Stream
from cl_moe.trainer import TrainerSpec

LAYERS = {
    "moe": partial(MoE, num_experts=4, hidden=8, router=partial(TopK, k=2)),
    "peer": partial(PEER, num_experts=16, heads=2, k=4, key_dim=8),
    "dense": DenseFFN,
}


@pytest.fixture
def new_stream() -> Callable[..., Stream]:
    """Three experiences of two classes; every train input differs from every other and from test's."""

    def data(index: int, rows: int, part: str, scenario: str) -> TensorDataset:
        inputs = torch.randn(rows, 6, generator=generator(3, index, part))
        targets = torch.arange(rows) % 2
        inputs += 2 * torch.randn(6, 6, generator=generator(3, "centres"))[targets + 2 * index]
        return TensorDataset(inputs, targets if scenario == "domain" else targets + 2 * index)

    def build(scenario: Scenario = "class", sizes: tuple[int, ...] = (24, 16, 20)) -> Stream:
        experiences = []
        for i, size in enumerate(sizes):
            train, test = data(i, size, "train", scenario), data(i, 8, "test", scenario)
            classes = (0, 1) if scenario == "domain" else (2 * i, 2 * i + 1)
            label = i if scenario == "task" else None
            experiences.append(Experience(i, f"e{i}", train, test, classes, label))
        num_classes = 2 if scenario == "domain" else 2 * len(sizes)
        return Stream("small", "classification", scenario, tuple(experiences), num_classes, (6,))

    return build


@pytest.fixture
def new_model() -> Callable[..., MLPClassifier]:
    def build(layer: str = "dense", seed: int = 0, **options: object) -> MLPClassifier:
        with seeded(seed, "init"):
            return MLPClassifier((6,), 6, LAYERS[layer], **({"width": 16} | options))

    return build


@pytest.fixture
def walk() -> Callable[..., Iterator[Learner]]:
    """Train experience by experience; hands the learner out after each adaptation and after each fit.

    With ``rebuild``, every boundary is a restart from a file.
    """

    def run(
        model: ContinualModel,
        stream: Stream,
        strategies: Mapping[str, Strategy],
        schedule: GrowthSchedule | None = None,
        policy: FreezePolicy | None = None,
        epochs: int = 2,
        lr: float = 0.1,
        momentum: float = 0.0,
        rows: str = "auto",
        rebuild: Callable[[], tuple[ContinualModel, dict[str, Strategy]]] | None = None,
    ) -> Iterator[tuple[str, Learner]]:
        optimizer = SGD(lr=lr, momentum=momentum, state="carry", rows=rows)
        spec = TrainerSpec(epochs=epochs, batch_size=8, accelerator="cpu")
        trainer = spec.build()
        learner = Learner(model, optimizer, strategies, stream)
        learner.epochs = epochs
        learner.ledger += add_classes(model, stream.classes_at_start, seed=0)
        for experience in stream:
            census = take_census(model, experience.index, learner.ledger, {})
            learner.ledger += adapt(
                model, census, schedule or NeverGrow(), policy or NeverFreeze(), experience.classes, seed=0
            )
            learner.experience = experience
            yield "adapted", learner
            if len(experience.train):
                spec.raise_epochs(trainer)
                loader = training_loader(experience.train, 8, 0, experience.index)
                trainer.fit(learner, train_dataloaders=loader)
            yield "trained", learner
            if rebuild:  # as after a crash: everything anew, from a file
                file = io.BytesIO()
                torch.save(learner.whole_state(), file)
                file.seek(0)
                model, strategies = rebuild()
                learner = Learner(model, optimizer, strategies, stream)
                learner.epochs = epochs
                learner.load_whole_state(torch.load(file, weights_only=True), lambda learner: learner)

    return run


@pytest.fixture
def train(walk) -> Callable[..., Learner]:
    """Walk a whole stream; the learner at its end."""

    def run(*args: object, **options: object) -> Learner:
        return list(walk(*args, **options))[-1][1]

    return run


@pytest.fixture
def outlook(new_model) -> Callable[..., Outlook]:
    """What a strategy sees of an experience, where the model does not matter."""
    model = new_model()

    def build(experience: Experience, seed: int = 0) -> Outlook:
        return Outlook(model, experience, "classification", seed)

    return build


@pytest.fixture
def growing() -> dict[str, GrowthSchedule]:
    """A schedule that each layer can follow."""
    return {
        "moe": EveryExperience(2, init="copy", noise=0.5),
        "peer": EveryExperience(4, init="copy", noise=0.5),
        "dense": NeverGrow(),
    }
