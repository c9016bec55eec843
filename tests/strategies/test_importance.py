"""EWC, SI and MAS: importances against loops by hand, their pull, growth, freezing, and that they act."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from cl_moe.errors import InputError, RunFailedError
from cl_moe.growth import EveryExperience, PastExperts
from cl_moe.strategies import EWC, MAS, SI, Naive, Step, Strategy

LAYERS = ["dense", "moe", "peer"]


def weights(learner) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in learner.model.named_parameters()}


def after_first(walk, new_model, new_stream, strategy: Strategy, layer: str = "dense", scenario="class"):
    """The learner as it is after the first experience."""
    for moment, learner in walk(new_model(layer), new_stream(scenario), {"s": strategy}):
        if moment == "trained":
            return learner
    raise AssertionError


def single_gradients(learner, score) -> list[dict[str, Tensor]]:
    """One backward pass for every example, written without the strategies' help."""
    model, found = copy.deepcopy(learner.model).eval(), []
    for x, y in zip(*learner.experience.train.tensors, strict=True):
        model.zero_grad()
        score(model(x.unsqueeze(0))[0], y).backward()
        grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
        found.append({name: gradient.clone() for name, gradient in grads.items()})
    return found


@pytest.mark.parametrize("layer", LAYERS)
def test_fisher_information_by_a_loop(walk, new_model, new_stream, layer: str) -> None:
    strategy = EWC()
    learner = after_first(walk, new_model, new_stream, strategy, layer)
    columns = {label: column for column, label in enumerate(learner.model.head.classes)}
    grads = single_gradients(learner, lambda z, y: F.cross_entropy(z, torch.tensor([columns[y.item()]])))
    (anchors,) = strategy.anchors
    assert anchors.importance.keys() == grads[0].keys()
    for name, value in anchors.importance.items():
        expected = torch.stack([g[name].square() for g in grads]).mean(0)
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-9, msg=name)
    batch = torch.stack([g["stem.weight"] for g in grads]).mean(0).square()
    assert not torch.allclose(anchors.importance["stem.weight"], batch), (
        "of single examples, not of the batch"
    )


def test_fisher_information_of_the_models_own_labels(walk, new_model, new_stream) -> None:
    """For a head's bias it is E[p_c (1 - p_c)]: exact in expectation over the drawn labels."""
    strategy = EWC(labels="model")
    learner = after_first(walk, new_model, new_stream, strategy)
    draws = []
    for seed in range(60):
        outlook = copy.copy(learner.outlook())
        object.__setattr__(outlook, "seed", seed)
        draws.append(strategy.fisher(outlook)["head.cohorts.0.bias"])
    p_nC = learner.model.eval()(learner.experience.train.tensors[0])[0].softmax(-1).detach()
    expected_C = (p_nC * (1 - p_nC)).mean(0)
    found_C, error_C = torch.stack(draws).mean(0), torch.stack(draws).std(0) / 60**0.5
    assert ((found_C - expected_C).abs() < 5 * error_C + 1e-6).all()


def test_ewc_in_the_task_scenario_looks_at_the_own_task(walk, new_model, new_stream) -> None:
    strategy = EWC()
    after_first(walk, new_model, new_stream, strategy, scenario="task")
    importance = strategy.anchors[0].importance
    assert importance["head.cohorts.0.weight"].any()
    assert not importance["head.cohorts.1.weight"].any(), "another task's rows have no say"


@pytest.mark.parametrize("layer", LAYERS)
def test_mas_by_a_loop(walk, new_model, new_stream, layer: str) -> None:
    strategy = MAS()
    learner = after_first(walk, new_model, new_stream, strategy, layer)
    grads = single_gradients(learner, lambda z, y: z.square().sum())
    for name, value in strategy.anchors.importance.items():
        expected = torch.stack([g[name].abs() for g in grads]).mean(0)
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-7, msg=name)


class Trace(Strategy):
    """Writes down the gradients of every step and the weights around it."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.slopes: list[dict[str, Tensor]] = []

    def gradients(self, model: Any) -> None:
        self.weights.append({n: p.detach().clone() for n, p in model.named_parameters()})
        self.slopes.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_path_integral_by_hand(walk, new_model, new_stream, momentum: float) -> None:
    """Two experiences: in the second, the strategy's own pull is no part of the loss that is integrated."""
    stream, si, trace = new_stream(sizes=(24, 16)), SI(strength=0.5, damping=0.1), Trace()
    total: dict[str, Tensor] = {}
    old: dict[str, Tensor] = {}
    for moment, learner in walk(new_model(), stream, {"si": si, "trace": trace}, momentum=momentum, lr=0.02):
        if moment == "adapted":
            start, trace.weights, trace.slopes = weights(learner), [], []
            continue
        values, importance = [*trace.weights, weights(learner)], dict(total)
        for name in values[0]:
            omega = torch.zeros_like(values[0][name])
            for t, slopes in enumerate(trace.slopes):
                own = 2 * 0.5 * importance[name] * (values[t][name] - old[name]) if name in old else 0.0
                omega -= (slopes[name] - own) * (values[t + 1][name] - values[t][name])
            gained = omega.clamp_min(0) / ((values[-1][name] - start[name]) ** 2 + 0.1)
            total[name] = importance.get(name, 0.0) + gained
        old = weights(learner)
        for name, value in total.items():
            torch.testing.assert_close(si.anchors.importance[name], value, rtol=1e-3, atol=1e-6)
            assert torch.equal(si.anchors.values[name], old[name])
    assert max(value.max().item() for value in total.values()) > 1e-3


def test_old_values_are_copies_and_not_the_live_weights(walk, new_model, new_stream) -> None:
    """A peer's SI keeps views of live weights: its pull is zero for ever."""
    for strategy in (SI(), MAS(), EWC()):
        learner = after_first(walk, new_model, new_stream, strategy)
        with torch.no_grad():
            for parameter in learner.model.parameters():
                parameter.add_(0.1)
        ((_, term),) = strategy.loss(Step(learner.model, *[None] * 5, {})).items()  # type: ignore[arg-type]
        assert term > 0


@pytest.mark.parametrize(("strategy", "factor"), [(EWC(3.0), 1.5), (SI(3.0), 3.0), (MAS(3.0), 3.0)])
def test_the_pull_by_hand(walk, new_model, new_stream, strategy: Strategy, factor: float) -> None:
    learner = after_first(walk, new_model, new_stream, strategy)
    anchors = strategy.anchors[0] if isinstance(strategy, EWC) else strategy.anchors  # type: ignore[attr-defined]
    with torch.no_grad():
        for parameter in learner.model.parameters():
            parameter.mul_(1.1)
    learner.model.head.grow([4, 5])  # newborns have no past
    ((_, term),) = strategy.loss(Step(learner.model, *[None] * 5, {})).items()  # type: ignore[arg-type]
    expected = sum(
        float(
            (anchors.importance[n].double() * (p.detach().double() - anchors.values[n].double()) ** 2).sum()
        )
        for n, p in learner.model.named_parameters()
        if n in anchors.values
    )
    assert term.item() == pytest.approx(factor * expected, rel=1e-5)


def test_online_ewc_has_one_running_term(walk, new_model, new_stream) -> None:
    separate, online = EWC(0.0), EWC(0.0, online=True, gamma=0.5)
    for strategy in (separate, online):
        for _ in walk(new_model(), new_stream(), {"s": strategy}):
            pass
    assert (len(separate.anchors), len(online.anchors)) == (3, 1)
    a, b, c = (anchors.importance["stem.weight"] for anchors in separate.anchors)
    torch.testing.assert_close(online.anchors[0].importance["stem.weight"], 0.25 * a + 0.5 * b + c)
    assert separate.buffer_bytes > 2.5 * online.buffer_bytes > 0


MAKERS = {"ewc": EWC, "online": lambda c: EWC(c, online=True), "si": SI, "mas": MAS}
STRENGTHS = {"ewc": 300.0, "online": 300.0, "si": 50.0, "mas": 5.0}


@pytest.mark.parametrize("layer", ["dense", "moe"])
@pytest.mark.parametrize("name", MAKERS)
def test_it_acts_where_weights_matter(walk, new_model, new_stream, name: str, layer: str) -> None:
    """Important weights stay nearer to where they were than without it, and with strength 0 it is naive."""
    stream = new_stream("domain", (32, 48))

    def trained(strategy: Strategy) -> tuple[Any, dict[str, Tensor]]:
        first = None
        for moment, living in walk(new_model(layer), stream, {"s": strategy}, lr=0.02, epochs=5):
            learner = living
            if moment == "trained" and first is None:
                kept = getattr(strategy, "anchors", None)
                first = copy.deepcopy(kept[0] if isinstance(kept, list) else kept)
        return (first.penalty(learner.model).item() if first else None), weights(learner)

    near, _ = trained(MAKERS[name](STRENGTHS[name]))
    far, free = trained(MAKERS[name](0.0))
    assert 0 < near < 0.8 * far
    assert all(torch.equal(value, free[key]) for key, value in trained(Naive())[1].items())


@pytest.mark.parametrize("strategy", [EWC(1e12), SI(1e12), MAS(1e12)], ids=lambda s: type(s).__name__)
def test_a_strength_too_high_ends_with_a_message(train, new_model, new_stream, strategy: Strategy) -> None:
    with pytest.raises(RunFailedError, match="not finite"):
        train(new_model(), new_stream(sizes=(24, 64)), {"s": strategy}, epochs=10)


@pytest.mark.parametrize("make", [EWC, SI, MAS])
def test_what_is_frozen_costs_nothing_and_newborns_begin_without(walk, new_model, new_stream, make) -> None:
    strategy = make()
    for moment, learner in walk(
        new_model("moe"), new_stream(), {"s": strategy}, EveryExperience(2), PastExperts(), lr=0.01
    ):
        if moment == "trained":
            continue
        strategy.begin(learner.outlook())
        kept = strategy.anchors if isinstance(strategy, EWC) else [strategy.anchors]
        live = {n for n, p in learner.model.named_parameters() if p.requires_grad}
        newest = f"blocks.0.cohorts.{len(learner.model.blocks[0].cohorts) - 1}."
        for anchors in kept:
            assert set(anchors.importance) == set(anchors.values) <= live
            assert not any(name.startswith(newest) for name in anchors.values)
            assert not anchors.importance or "stem.weight" in anchors.importance


@pytest.mark.parametrize(
    ("make", "options", "key"),
    [
        (EWC, {"strength": -1.0}, "strategy.ewc.strength"),
        (EWC, {"gamma": 1.5}, "strategy.ewc.gamma"),
        (EWC, {"labels": "both"}, "strategy.ewc.labels"),
        (EWC, {"samples": 0}, "strategy.ewc.samples"),
        (SI, {"damping": 0.0}, "strategy.si.damping"),
        (SI, {"strength": float("nan")}, "strategy.si.strength"),
        (MAS, {"strength": -1.0}, "strategy.mas.strength"),
        (MAS, {"samples": 1.5}, "strategy.mas.samples"),
    ],
)
def test_what_cannot_be_is_refused(make, options: dict[str, Any], key: str) -> None:
    with pytest.raises(InputError) as caught:
        make(**options)
    assert caught.value.key == key


@pytest.mark.parametrize("batches", [1, 2])
def test_the_own_pull_is_no_part_of_a_step_however_many_batches_it_had(
    walk, new_model, new_stream, batches: int
) -> None:
    """An epoch's last step may have fewer batches than others; its slope is that of their mean loss."""
    strategy = SI(strength=3.0)
    learner = after_first(walk, new_model, new_stream, strategy)
    learner.experience = new_stream()[1]
    strategy.begin(dataclasses.replace(learner.outlook(), accumulate=2))
    with torch.no_grad():
        learner.model.stem.weight += 0.1
    inputs, targets = (column[:4] for column in new_stream()[0].train.tensors)
    task: dict[str, Tensor] = {}
    learner.model.zero_grad()
    for _ in range(batches):
        logits, routings = learner.model(inputs)
        loss = F.cross_entropy(logits, targets) / 2
        for name, p in learner.model.named_parameters():
            task[name] = task.get(name, 0) + torch.autograd.grad(loss, p, retain_graph=True)[0]
        pull = strategy.loss(Step(learner.model, inputs, targets, None, logits, routings))["si"]
        (loss + pull / 2).backward()
    strategy.gradients(learner.model)
    for name, slope in strategy._slope.items():
        torch.testing.assert_close(slope, task[name] * 2 / batches, rtol=1e-4, atol=1e-6)
