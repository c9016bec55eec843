"""One step and its end: what padding is, what the terms are, what a run must not survive."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from cl_moe.errors import InputError, RunFailedError
from cl_moe.layers import DenseFFN, MoE, TopK
from cl_moe.learner import Learner
from cl_moe.models import ContinualModel, DecoderLM, MLPClassifier
from cl_moe.optim import SGD
from cl_moe.seeds import generator, seeded
from cl_moe.strategies import Strategy
from cl_moe.stream import IGNORE, Experience, Kind, Scenario, Stream
from cl_moe.trainer import TrainerSpec

LOGITS = torch.randn(60, 6, generator=generator(0, "logits"))
TARGETS = torch.arange(60) % 6


def one_experience(kind: Kind, num_classes: int) -> Stream:
    """A stream of which only the words count: its batches are handed over by the tests."""
    data = TensorDataset(LOGITS, TARGETS)
    scenario: Scenario = "class" if kind == "classification" else "domain"
    classes = tuple(range(num_classes)) if kind == "classification" else ()
    experience = Experience(0, "only", data, data, classes)
    return Stream("small", kind, scenario, (experience,), num_classes, (6,))


TEXT = one_experience("language", 11)
CLASSES = one_experience("classification", 6)


def learner_of(model: ContinualModel, stream: Stream) -> Learner:
    learner = Learner(model, SGD(lr=0.1), {}, stream)
    learner.place_classes()
    return learner


def decoder() -> DecoderLM:
    with seeded(0, "init"):
        layer = partial(MoE, num_experts=4, hidden=8, router=partial(TopK, k=2))
        return DecoderLM((8,), 11, layer, width=16, num_blocks=1, num_heads=2)


def padded() -> tuple[Tensor, Tensor]:
    draw = generator(0, "text")
    inputs = torch.randint(11, (4, 8), generator=draw)
    targets = torch.randint(11, (4, 8), generator=draw)
    length = torch.tensor([[8], [5], [3], [1]])
    return inputs, torch.where(torch.arange(8) < length, targets, IGNORE)


def test_padding_is_outside_loss_and_score() -> None:
    inputs, targets = padded()
    learner = learner_of(decoder(), TEXT)
    logits = learner.model(inputs)[0]
    real = targets != IGNORE
    losses = F.cross_entropy(logits[real].double(), targets[real], reduction="none")
    assert learner.task_loss(logits, targets).item() == pytest.approx(losses.mean().item(), rel=1e-5)
    total, count = learner.score(logits, targets)
    assert count.item() == real.sum() == 17
    assert total.item() == pytest.approx(-losses.sum().item(), rel=1e-5)


def test_what_stands_on_padding_changes_no_loss_term_and_no_gradient() -> None:
    """Through the training step: routers, balance loss and counts do not see it either."""
    inputs, targets = padded()
    other = torch.where(targets == IGNORE, (inputs + 5) % 11, inputs)
    gradients, notes = [], []
    for tokens in (inputs, other):
        learner = learner_of(decoder(), TEXT)
        learner.note = lambda points, step: notes.append(dict(points))
        learner.training_step((tokens, targets), 0).backward()
        gradients.append([p.grad for p in learner.model.blocks.parameters()])
    assert notes[0].keys() == notes[1].keys() >= {"train/task_loss", "train/balance"}
    for name, value in notes[0].items():
        assert value == pytest.approx(notes[1][name], abs=1e-6), name
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


# ---- what a run must not survive


def fit(learner: Learner, batches: Sequence[tuple[Tensor, Tensor]]) -> None:
    spec = TrainerSpec(accelerator="cpu", batch_size=len(batches[0][0]))
    trainer = spec.build()
    learner.experience = CLASSES[0]
    spec.raise_epochs(trainer)
    trainer.fit(learner, train_dataloaders=DataLoader(list(batches), batch_size=None))


def plain_learner(lr: float = 0.1, strategies: Mapping[str, Strategy] | None = None) -> Learner:
    with seeded(0, "init"):
        model = MLPClassifier((6,), 6, DenseFFN, width=8)
        model.head.grow(range(6))
    return Learner(model, SGD(lr=lr), strategies or {}, CLASSES, log_every=100)


def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_step() -> None:
    batches = [(LOGITS[:8].clone(), TARGETS[:8]) for _ in range(5)]
    batches[3][0][2, 1] = float("nan")
    with pytest.raises(RunFailedError, match=r"step 3: task_loss nan, 1 of its 8 inputs.*the first is 2"):
        fit(plain_learner(), batches)
    learner = plain_learner()
    with torch.no_grad():
        learner.model.head.cohorts[0].weight[0, 0] = float("nan")
    with pytest.raises(RunFailedError, match=r"step 0.*task_loss nan"):
        fit(learner, batches)


def test_weights_that_are_not_finite_are_not_kept() -> None:
    """The last step of a fit has no loss after it: an overflow there must not go into a checkpoint."""
    with pytest.raises(RunFailedError, match=r"weights not finite after step 1: .*weight"):
        fit(plain_learner(lr=1e39), [(LOGITS[:8] * 10, TARGETS[:8])])


def test_the_terms_noted_add_up_to_the_loss() -> None:
    class Extra(Strategy):
        def loss(self, step: object) -> dict[str, Tensor]:
            return {"extra": torch.tensor(0.25), "more": torch.tensor(0.5)}

    learner = plain_learner(strategies={"extra": Extra()})
    notes: list[Mapping[str, float]] = []
    learner.note = lambda points, step: notes.append(points)
    learner.place_classes()
    loss = learner.training_step((LOGITS, TARGETS), 0)
    assert notes[0]["train/loss"] == loss.item()
    terms = {name: value for name, value in notes[0].items() if name != "train/loss"}
    assert set(terms) == {"train/task_loss", "train/extra", "train/more"}
    assert sum(terms.values()) == pytest.approx(loss.item())


def test_a_model_of_the_other_kind_is_refused() -> None:
    for model, stream in ((plain_learner().model, TEXT), (decoder(), CLASSES)):
        with pytest.raises(InputError) as caught:
            learner_of(model, stream)
        assert "model" in caught.value.key
