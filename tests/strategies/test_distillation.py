"""LwF and Lifelong-MoE: the right term, a gradient on the right side, and an effect."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from cl_moe.errors import InputError
from cl_moe.growth import NeverFreeze, PastExperts
from cl_moe.strategies import LifelongMoE, LwF, Naive, Outlook, Step, Strategy


def softmax(x: np.ndarray) -> np.ndarray:
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def kl_by_hand(student: Tensor, teacher: Tensor, temperature: float) -> float:
    """T^2 times the mean over rows of sum p log(p / q), in float64 numpy."""
    p = softmax(teacher.detach().double().numpy() / temperature)
    q = softmax(student.detach().double().numpy() / temperature)
    return temperature**2 * float((p * (np.log(p) - np.log(q))).sum(-1).mean())


def taught(new_model, strategy: Strategy, classes: tuple[int, ...] = (0, 1, 2)):
    """A model with head rows, which the strategy has learnt as its teacher."""
    model = new_model("moe")
    model.head.grow(classes)
    strategy.end(Outlook(model, FakeExperience(classes), "classification", 0))
    return model


class FakeExperience:
    """All that ``end`` asks of an experience."""

    def __init__(self, classes: tuple[int, ...]) -> None:
        self.classes = classes


def step_of(model, inputs: Tensor, mask: Tensor | None = None) -> Step:
    logits, routings = model(inputs)
    return Step(model, inputs, torch.zeros(len(inputs)).long(), mask, logits, routings)


def drift(model, size: float = 0.3) -> None:
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn_like(parameter))


INPUTS = torch.randn(16, 6, generator=torch.Generator().manual_seed(4))
STRATEGIES = [(LwF(alpha=0.7, temperature=2.0), "lwf", 0.7, 2.0)]
STRATEGIES += [(LifelongMoE(strength=1.5, temperature=1.0), "lifelong_moe", 1.5, 1.0)]


@pytest.mark.parametrize(("strategy", "name", "strength", "temperature"), STRATEGIES)
def test_the_term_by_hand(new_model, strategy, name: str, strength: float, temperature: float) -> None:
    model = taught(new_model, strategy)
    old = model(INPUTS)[0].detach()
    same = strategy.loss(step_of(model, INPUTS))
    assert list(same) == [name]
    assert same[name].item() == 0.0, "a student equal to its teacher has nothing to learn from it"
    drift(model)
    model.head.grow([3, 4])  # new columns are none of the teacher's business
    step = step_of(model, INPUTS)
    term = strategy.loss(step)[name]
    assert term.shape == ()
    assert term.item() == pytest.approx(strength * kl_by_hand(step.logits[:, :3], old, temperature), rel=1e-5)
    assert term.item() > 1e-3


@pytest.mark.parametrize("strategy", [LwF(), LifelongMoE(l2=0.1)])
def test_the_gradient_reaches_the_student_and_not_the_teacher(new_model, strategy) -> None:
    model = taught(new_model, strategy)
    drift(model)
    model.head.grow([3, 4])
    kept = {name: value.clone() for name, value in strategy.teacher.values.items()}
    sum(strategy.loss(step_of(model, INPUTS)).values()).backward()
    for name, parameter in model.named_parameters():
        if name.startswith("head.cohorts.1"):
            assert parameter.grad is None or not parameter.grad.any(), "new columns stand outside"
        else:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name
    for name, value in strategy.teacher.values.items():
        assert value.grad is None
        assert torch.equal(value, kept[name])


def test_the_gradient_by_hand(new_model) -> None:
    """d/dz of T^2 KL is T (softmax(z / T) - softmax(z_old / T)) / B."""
    strategy = LwF(alpha=1.0, temperature=2.0)
    model = taught(new_model, strategy)
    old = model(INPUTS)[0].detach()
    drift(model)
    step = step_of(model, INPUTS)
    (gradient,) = torch.autograd.grad(strategy.loss(step)["lwf"], step.logits)
    expected = 2.0 * ((step.logits / 2).softmax(-1) - (old / 2).softmax(-1)) / len(INPUTS)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7)


def test_padding_teaches_nothing(new_model) -> None:
    strategy = LwF()
    model = taught(new_model, strategy)
    old = model(INPUTS)[0].detach()
    drift(model)
    mask = torch.arange(16) % 3 > 0
    step = step_of(model, INPUTS)
    step.mask = mask
    strategy.teacher.logits = lambda *_: old  # a perceptron takes no mask
    expected = kl_by_hand(step.logits[mask], old[mask], 2.0)
    assert strategy.loss(step)["lwf"].item() == pytest.approx(expected, rel=1e-5)


def test_task_incremental_terms_add_up_over_trained_tasks(new_model) -> None:
    """Every old task's columns are a distribution of their own; tasks to come and today's teach nothing."""
    strategy = LwF(alpha=1.0, temperature=2.0)
    model = new_model("moe")
    for classes in ((0, 1), (2, 3), (4, 5)):  # the head is whole from the start
        model.head.grow(classes)
    group = torch.tensor([0, 0, 1, 1, 2, 2])
    for task, classes in enumerate([(0, 1), (2, 3)]):
        outlook = Outlook(model, FakeExperience(classes), "classification", 0, group)
        strategy.begin(outlook)
        strategy.end(outlook)
        old = model(INPUTS)[0].detach()
        drift(model)
        step = step_of(model, INPUTS)
        columns = [slice(0, 2), slice(2, 4)][: task + 1]
        expected = sum(kl_by_hand(step.logits[:, c], old[:, c], 2.0) for c in columns)
        term = strategy.loss(step)["lwf"]
        assert term.item() == pytest.approx(expected, rel=1e-5)
        (gradient,) = torch.autograd.grad(term, step.logits)
        assert not gradient[:, 2 * task + 2 :].any(), "a task not yet trained is free"


def test_task_incremental_lwf_still_learns_the_new_task(new_model, new_stream, walk) -> None:
    """However strong, it holds on to old heads and lets the new one learn."""
    stream = new_stream("task")
    for moment, learner in walk(new_model(), stream, {"lwf": LwF(alpha=20.0)}, epochs=10, lr=0.02):
        if moment == "trained":
            learner.on_test_start()
            inputs, targets = learner.experience.test.tensors
            right, count = learner.score(learner.model.eval()(inputs)[0], targets)
            assert right / count >= 0.75, learner.experience.index
            learner.model.train()


def weights(learner) -> Tensor:
    return torch.cat([value.flatten() for value in learner.model.state_dict().values()])


@pytest.mark.parametrize("layer", ["dense", "moe", "peer"])
@pytest.mark.parametrize("kind", [LwF, LifelongMoE])
def test_it_acts(new_model, new_stream, train, growing, layer: str, kind) -> None:
    def end(strategy: Strategy) -> Tensor:
        return weights(train(new_model(layer), new_stream(), {"s": strategy}, growing[layer], PastExperts()))

    naive = end(Naive())
    assert torch.equal(end(kind(0.0)), naive), "a strength of 0 is plain fine-tuning"
    acted = end(kind(1.0))
    assert acted.isfinite().all()
    assert (acted - naive).abs().max() > 1e-3


def test_it_holds_on_to_old_answers(new_model, new_stream, walk) -> None:
    """Distillation keeps the model closer to what it answered before, and more so the stronger it is."""

    def moved(strategy: Strategy) -> float:
        inputs = new_stream()[1].train.tensors[0]
        old = None
        for moment, learner in walk(new_model("dense"), new_stream(), {"s": strategy}, epochs=5, lr=0.05):
            if moment == "trained" and learner.experience.index == 0:
                old = learner.model(inputs)[0].detach()
            if moment == "trained" and learner.experience.index == 1:
                return kl_by_hand(learner.model(inputs)[0][:, :2], old, 1.0)
        raise AssertionError

    naive, weak, strong = moved(Naive()), moved(LwF(alpha=0.5)), moved(LwF(alpha=5.0))
    assert naive > 1.5 * weak > 1.5 * strong


def test_the_pull_is_the_squared_distance_of_what_learns_and_was_there(
    new_model, new_stream, walk, growing
) -> None:
    strategy = LifelongMoE(strength=1.0, l2=0.25)
    seen = 0
    steps = walk(new_model("moe"), new_stream(), {"s": strategy}, growing["moe"], PastExperts())
    for moment, learner in steps:
        if moment == "adapted" and learner.experience.index:
            model = learner.model
            old = {n: p.detach().clone() for n, p in model.named_parameters()}
            assert strategy.loss(step_of(model, INPUTS))["lifelong_moe_l2"].item() == 0.0
            drift(model, 0.01)  # frozen and newborn parts move here too, and must not count
            newborn = f"blocks.0.cohorts.{learner.experience.index}."
            rows = f"head.cohorts.{learner.experience.index}."
            expected = sum(
                (p - old[n]).double().square().sum().item()
                for n, p in model.named_parameters()
                if p.requires_grad and not n.startswith((newborn, rows))
            )
            term = strategy.loss(step_of(model, INPUTS))["lifelong_moe_l2"]
            assert term.item() == pytest.approx(0.25 * expected, rel=1e-5)
            gradient = torch.autograd.grad(term, model.stem.weight)[0]
            torch.testing.assert_close(gradient, 0.5 * (model.stem.weight - old["stem.weight"]))
            seen += 1
    assert seen == 2


def test_no_pull_unless_asked_for(new_model) -> None:
    strategy = LifelongMoE()
    model = taught(new_model, strategy)
    assert list(strategy.loss(step_of(model, INPUTS))) == ["lifelong_moe"]


@pytest.mark.parametrize("strategy", [LwF(), LifelongMoE(l2=1.0)])
def test_nothing_in_the_first_experience(new_model, strategy) -> None:
    model = new_model()
    model.head.grow([0, 1])
    assert strategy.loss(step_of(model, INPUTS)) == {}
    assert strategy.buffer_bytes == 0


@pytest.mark.parametrize(
    ("build", "key"),
    [
        (lambda: LwF(alpha=-1), "strategy.lwf.alpha"),
        (lambda: LwF(temperature=0), "strategy.lwf.temperature"),
        (lambda: LifelongMoE(strength=math.nan), "strategy.lifelong_moe.strength"),
        (lambda: LifelongMoE(temperature=-2), "strategy.lifelong_moe.temperature"),
        (lambda: LifelongMoE(l2=-0.1), "strategy.lifelong_moe.l2"),
    ],
)
def test_what_cannot_be_is_refused_before_any_training(build, key: str) -> None:
    with pytest.raises(InputError) as caught:
        build()
    assert caught.value.key == key


def test_frozen_experts_still_pass_the_gradient_on(new_model, new_stream, train, growing) -> None:
    """The trunk below frozen experts learns through them: freezing is not detaching."""
    frozen = train(new_model("moe"), new_stream(), {"s": LwF()}, growing["moe"], PastExperts())
    free = train(new_model("moe"), new_stream(), {"s": LwF()}, growing["moe"], NeverFreeze())
    assert not torch.equal(weights(frozen), weights(free))
    fresh = new_model("moe").stem.weight
    assert (frozen.model.stem.weight - fresh).abs().max() > 1e-3
