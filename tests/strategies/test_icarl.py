"""iCaRL: herding by brute force, its loss by hand, the nearest mean, and what an evaluation gets of it."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cl_moe.errors import InputError
from cl_moe.evaluation import evaluate
from cl_moe.strategies import ICaRL, Step, Strategy
from cl_moe.strategies.icarl import FARTHEST, herd
from cl_moe.strategies.passes import features_of


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(1, 14))
def test_herding_by_brute_force(seed: int, rows: int, count: int) -> None:
    features = np.random.default_rng(seed).normal(size=(rows, 3))
    mean, chosen = unit(features).mean(0), list[int]()
    for _ in range(min(count, rows)):
        distances = [
            np.inf if row in chosen else np.linalg.norm(mean - unit(features)[[*chosen, row]].mean(0))
            for row in range(rows)
        ]
        chosen.append(int(np.argmin(distances)))
    assert herd(torch.tensor(features), count).tolist() == chosen
    assert herd(torch.tensor(features), rows).tolist()[: len(chosen)] == chosen, (
        "a shorter list is a beginning"
    )


class Watch(Strategy):
    """Keeps what the inner strategy's loss was made from."""

    def __init__(self, inner: ICaRL) -> None:
        self.inner, self.steps = inner, list[tuple[Any, ...]]()
        self.old = None

    def begin(self, outlook: Any) -> None:
        self.inner.begin(outlook)
        self.now = outlook.experience.classes

    def batch(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner.batch(inputs, targets)

    def loss(self, step: Step) -> dict[str, Tensor]:
        terms = self.inner.loss(step)
        answer = self.inner.teacher.logits(step.model, step.inputs, None) if self.inner.teacher else None
        self.steps.append((step.logits.detach(), step.targets, step.task_loss, answer, self.now, terms))
        return terms

    def end(self, outlook: Any) -> None:
        self.inner.end(outlook)


def test_the_loss_by_hand(train, new_model, new_stream) -> None:
    """Binary cross-entropies: labels for new classes, old answers for old ones; the task loss is gone."""
    watch = Watch(ICaRL(memory_size=12))
    train(new_model(), new_stream(), {"icarl": watch}, epochs=2)
    for logits, targets, task_loss, answer, now, terms in watch.steps:
        p, total = torch.sigmoid(logits.double()), 0.0
        for row, column in itertools.product(*map(range, logits.shape)):  # classes arrive as 0, 1, 2, ..
            wanted = float(targets[row] == column)
            if column not in now:
                wanted = float(torch.sigmoid(answer[row, column].double()))
            q = float(p[row, column])
            total -= wanted * np.log(q) + (1 - wanted) * np.log(1 - q)
        assert terms["icarl"].item() == pytest.approx(total / len(targets), rel=1e-4)
        assert terms["icarl_task"].item() == -task_loss.item()
    assert max(len(step[1]) for step in watch.steps) > 8, "exemplars stand in the batch"


def test_exemplars_and_means(walk, new_model, new_stream) -> None:
    stream, icarl = new_stream(), ICaRL(memory_size=13)
    for moment, learner in walk(new_model(), stream, {"icarl": icarl}):
        if moment != "trained":
            continue
        seen = range(2 * learner.experience.index + 2)
        assert list(icarl.exemplars) == list(seen)
        assert {len(kept) for kept in icarl.exemplars.values()} == {13 // len(seen)}
        model, read = learner.model.eval(), []
        hook = model.head.register_forward_pre_hook(lambda _, x, read=read: read.append(x[0].detach()))
        for label in seen:
            pool = torch.cat([e.train.tensors[0][e.train.tensors[1] == label] for e in stream])
            rows = {tuple(row.tolist()) for row in pool}
            assert {tuple(row.tolist()) for row in icarl.exemplars[label]} <= rows
            model(icarl.exemplars[label])
            mean = unit(unit(read.pop().numpy()).mean(0))
            np.testing.assert_allclose(icarl.means[label].numpy(), mean, rtol=1e-4, atol=1e-5)
        hook.remove()
        model.train()
    assert icarl.buffer_bytes > 0


def test_the_nearest_mean_answers(train, new_model, new_stream) -> None:
    icarl = ICaRL(memory_size=30)
    learner = train(new_model("moe"), new_stream(), {"icarl": icarl}, epochs=5)
    model, read = learner.model.eval(), list[Tensor]()
    inputs = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
    hook = model.head.register_forward_pre_hook(lambda _, x: read.append(x[0].detach()))
    logits = model(inputs)[0].detach()
    hook.remove()
    scores = icarl.predict(model, read[0], logits)
    means = np.stack([icarl.means[label].numpy() for label in model.head.classes])
    distances = ((unit(read[0].numpy())[:, None] - means) ** 2).sum(-1)
    np.testing.assert_allclose(scores.numpy(), -distances, rtol=1e-4, atol=1e-5)
    assert (scores > FARTHEST).all()
    assert not torch.equal(scores.argmax(1), logits.argmax(1)), "another answer than the head's"
    del icarl.means[3]
    assert (icarl.predict(model, read[0], logits)[:, 3] == FARTHEST).all()
    assert icarl.predict(model, read[0], logits[:, :4]).shape == (40, 4), "with fewer classes known then"
    icarl.means.clear()
    assert icarl.predict(model, read[0], logits) is logits


@pytest.mark.parametrize("scenario", ["class", "task"])
def test_an_evaluation_scores_what_the_strategy_predicts(train, new_model, new_stream, scenario: str) -> None:
    stream, icarl = new_stream(scenario), ICaRL(memory_size=30)
    learner = train(new_model("moe"), stream, {"icarl": icarl}, epochs=1, lr=0.03)
    with torch.no_grad():
        learner.model.head.cohorts[0].bias += 100.0  # the head itself would answer with nothing else
    row = evaluate(learner.trainer, learner, stream[:], 256).row
    model, means = learner.model.eval(), torch.stack([icarl.means[label] for label in range(6)])
    for experience, score in zip(stream, row.tolist(), strict=True):
        inputs, targets = experience.test.tensors
        distances = torch.cdist(F.normalize(features_of(model, inputs), dim=1), means)
        if scenario == "task":
            others = [label for label in range(6) if label not in experience.classes]
            distances[:, others] = torch.inf
        assert score == pytest.approx((distances.argmin(1) == targets).double().mean().item())
    assert row.mean() > 0.6


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("stream.scenario=domain",), "stream.scenario=domain"),
        (("stream=text_domains",), "language stream"),
        (("strategy.icarl.memory_size=9",), "a memory of 9 for 10 classes"),
    ],
)
def test_what_it_cannot_serve_is_refused_with_both_names(command, words, named: str) -> None:
    ran = command("strategy=icarl", "tracking=none", *words)
    assert (ran.status, "strategy=icarl" in ran.text, named in ran.text) == (2, True, True), ran.text


def test_two_that_classify_in_their_own_way_are_refused(new_model, new_stream, train) -> None:
    with pytest.raises(InputError, match="one of a, b"):
        train(new_model(), new_stream(), {"a": ICaRL(), "b": ICaRL()})
