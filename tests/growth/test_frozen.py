"""Law 1 through the real thing: the bytes of what is frozen never change, under decay and momentum."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from cl_moe.batches import training_loader
from cl_moe.growth import (
    AllPast,
    EveryExperience,
    FreezePolicy,
    NeverFreeze,
    PastExperts,
    PastExpertsAndRouter,
)
from cl_moe.growth.adapt import adapt, take_census
from cl_moe.learner import Learner
from cl_moe.models import ContinualModel
from cl_moe.optim import SGD, AdamW, OptimizerSpec
from cl_moe.stream import Stream
from cl_moe.trainer import TrainerSpec

NEWBORNS = {"moe": 2, "peer": 4}
Snapshot = Callable[[ContinualModel], dict[str, bytes]]


class Story:
    """What a model was before and after every adaptation and fit of a stream."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self.known: list[set[str]] = []  # names before each adaptation
        self.adapted: list[dict[str, bytes]] = []
        self.trained: list[dict[str, bytes]] = []

    def tell(
        self,
        model: ContinualModel,
        stream: Stream,
        policy: FreezePolicy,
        optimizer: OptimizerSpec,
        layer: str,
        precision: str = "32-true",
    ) -> Story:
        spec = TrainerSpec(epochs=2, batch_size=8, accelerator="cpu", precision=precision)
        trainer = spec.build()
        learner = Learner(model, optimizer, {}, stream)
        schedule = EveryExperience(NEWBORNS[layer], init="copy")
        for experience in stream:
            self.known.append(set(model.state_dict()))
            census = take_census(model, experience.index, learner.ledger, {})
            learner.ledger += adapt(model, census, schedule, policy, experience.classes, seed=0)
            self.adapted.append(self.snapshot(model))
            learner.experience = experience
            spec.raise_epochs(trainer)
            trainer.fit(learner, train_dataloaders=training_loader(experience.train, 8, 0, experience.index))
            self.trained.append(self.snapshot(model))
            held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
            for name, parameter in model.named_parameters():
                assert (id(parameter) in held) == parameter.requires_grad, name
                if not parameter.requires_grad:
                    assert parameter.grad is None, name
        assert trainer.global_step == 3 * 2 * 4
        return self


def frozen_names(policy: FreezePolicy, known: set[str], experience: int) -> set[str]:
    """What has to stand still in an experience, by the policy's words alone."""
    if experience == 0 or isinstance(policy, NeverFreeze):
        return set()
    if isinstance(policy, AllPast):
        return known
    frozen = {name for name in known if name.startswith("blocks.0.cohorts.")}
    if isinstance(policy, PastExpertsAndRouter):
        frozen |= {name for name in known if name.startswith("blocks.0.query")}
    return frozen


OPTIMIZERS = {
    "adamw": lambda: AdamW(lr=0.01, weight_decay=0.1, state="carry"),
    "sgd": lambda: SGD(lr=0.05, momentum=0.9, weight_decay=0.1, state="carry"),
}


@pytest.mark.parametrize("layer", ["moe", "peer"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("policy", [PastExperts(), PastExpertsAndRouter(), AllPast()])
def test_frozen_is_frozen(
    new_model, blobs: Stream, snapshot: Snapshot, layer: str, optimizer: str, policy: FreezePolicy
) -> None:
    story = Story(snapshot).tell(new_model(layer), blobs, policy, OPTIMIZERS[optimizer](), layer)
    check(story, policy, layer)


@pytest.mark.parametrize("layer", ["moe", "peer"])
def test_frozen_is_frozen_in_mixed_precision(
    new_model, blobs: Stream, snapshot: Snapshot, layer: str
) -> None:
    policy = PastExpertsAndRouter()
    story = Story(snapshot).tell(
        new_model(layer), blobs, policy, OPTIMIZERS["adamw"](), layer, precision="bf16-mixed"
    )
    check(story, policy, layer)


def check(story: Story, policy: FreezePolicy, layer: str) -> None:
    frozen_once: set[str] = set()
    for experience in (1, 2):
        frozen = frozen_names(policy, story.known[experience], experience)
        assert frozen >= frozen_once
        assert frozen
        for name in frozen:
            before = story.trained[experience - 1][name]
            assert story.adapted[experience][name] == before, f"{name} changed at the boundary"
            assert story.trained[experience][name] == before, f"{name} changed in training"
        frozen_once = frozen
        newborn = f"blocks.0.cohorts.{experience}."
        for name in story.adapted[experience]:
            if name.startswith(newborn) or name.startswith(f"head.cohorts.{experience}."):
                assert story.trained[experience][name] != story.adapted[experience][name], f"{name} is stuck"
        if not isinstance(policy, AllPast):
            assert story.trained[experience]["stem.weight"] != story.adapted[experience]["stem.weight"]
    if layer == "peer" and isinstance(policy, PastExpertsAndRouter):
        assert any(name.endswith("running_mean") for name in frozen_once)


def test_without_a_policy_the_same_training_moves_everything(new_model, blobs, snapshot) -> None:
    """The laws above would hold of a model that never learns: here the same parts do move."""
    story = Story(snapshot).tell(new_model("peer"), blobs, NeverFreeze(), OPTIMIZERS["adamw"](), "peer")
    for name in story.known[2]:
        assert story.trained[2][name] != story.trained[1][name], name


def test_a_stale_gradient_is_dropped_by_freezing(new_model) -> None:
    model = new_model("peer")
    torch.manual_seed(0)
    model(torch.randn(8, 6))[0].sum()
    model.head.grow([0])
    model(torch.randn(8, 6))[0].sum().backward()
    assert all(p.grad is not None for p in model.blocks[0].cohorts[0].parameters())
    adapt(model, take_census(model, 1, [], {}), EveryExperience(4), PastExpertsAndRouter(), (1,), seed=0)
    gone = [model.blocks[0].cohorts[0], *model.blocks[0].shared_router]
    assert all(p.grad is None and not p.requires_grad for part in gone for p in part.parameters())
