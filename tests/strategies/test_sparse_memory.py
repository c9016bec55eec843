"""Sparse memory finetuning: the score by a loop, which rows move and by how much, and what stands still."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from cl_moe.errors import InputError
from cl_moe.layers import PKM
from cl_moe.models import MLPClassifier
from cl_moe.seeds import generator, seeded
from cl_moe.strategies import SparseMemory, Step, Strategy

SMALL = {"num_background": 6, "background_size": 8, "top_t": 3}


class Watch(Strategy):
    """Reads of every step, and the weights and gradients it began with."""

    def __init__(self, inner: SparseMemory) -> None:
        self.inner, self.steps = inner, list[dict[str, Any]]()

    def begin(self, outlook: Any) -> None:
        self.inner.begin(outlook)
        self.steps = []

    def batch(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner.batch(inputs, targets)

    def loss(self, step: Step) -> dict[str, Tensor]:
        self.reads = [0] * step.routings[0].num_experts
        for chosen in step.routings[0].expert.flatten().tolist():
            self.reads[chosen] += 1
        return self.inner.loss(step)

    def gradients(self, model: Any) -> None:
        live = dict(model.named_parameters())
        before = {name: p.detach().clone() for name, p in live.items()}
        slopes = {name: p.grad.clone() for name, p in live.items() if p.grad is not None}
        self.inner.gradients(model)
        left = {name for name, p in live.items() if p.grad is not None}
        self.steps.append({"before": before, "slopes": slopes, "reads": self.reads, "left": left})

    def end(self, outlook: Any) -> None:
        self.inner.end(outlook)


def background_by_a_loop(learner: Any, batches: int, size: int) -> list[int]:
    """In how many background batches each row was read."""
    data, draw = learner.experience.train.tensors[0], generator(0, 0, "background")
    seen, model = [0] * learner.model.blocks[0].num_experts, learner.model.eval()
    for _ in range(batches):
        rows = torch.randperm(len(data), generator=draw)[:size]
        for row in set(model(data[rows])[1][0].expert.flatten().tolist()):
            seen[row] += 1
    model.train()
    return seen


@pytest.mark.parametrize("score", ["tf_idf", "tf", "all"])
def test_the_rows_that_learn_by_a_loop(walk, new_model, new_stream, score: str) -> None:
    watch = Watch(SparseMemory(score=score, lr=0.7, **SMALL))
    moved = 0
    for moment, learner in walk(new_model("peer"), new_stream(), {"s": watch}, momentum=0.9):
        if moment == "adapted":
            continue
        if learner.experience.index == 0:
            seen = background_by_a_loop(learner, 6, 8)
            assert watch.inner.background[0].tolist() == seen
            assert 0 < sum(seen) < 6 * len(seen)
            assert all(len(step["left"]) == len(step["slopes"]) for step in watch.steps), "trained as ever"
            continue
        after = [*(s["before"] for s in watch.steps[1:]), dict(learner.model.named_parameters())]
        for step, then in zip(watch.steps, after, strict=True):
            total = sum(step["reads"])
            value = {i: c / total for i, c in enumerate(step["reads"]) if c}
            if score == "tf_idf":
                value = {i: v * math.log(7 / (seen[i] + 1)) for i, v in value.items()}
            ranked = sorted(value, key=lambda i: (-value[i], i))[: None if score == "all" else 3]
            name, expected = "blocks.0.cohorts.0.v", step["before"]["blocks.0.cohorts.0.v"].clone()
            expected[ranked] -= 0.7 * step["slopes"][name][ranked]
            torch.testing.assert_close(then[name].detach(), expected, rtol=1e-6, atol=1e-8)
            moved += int((then[name] != step["before"][name]).any())
    assert moved > 3


@pytest.mark.parametrize("rows", ["v", "uv"])
@pytest.mark.parametrize("scenario", ["class", "domain", "task"])
def test_all_else_stands_still(walk, new_model, new_stream, scenario: str, rows: str) -> None:
    strategy = SparseMemory(rows=rows, lr=0.5, **SMALL)
    before: dict[str, Tensor] = {}
    for moment, learner in walk(new_model("peer"), new_stream(scenario), {"s": strategy}, momentum=0.9):
        state = learner.model.state_dict()
        if moment == "adapted":
            before = {name: value.clone() for name, value in state.items()}
        elif learner.experience.index:
            moved = {name for name, value in state.items() if not torch.equal(value, before[name])}
            head = {name for name in moved if name.startswith("head.")}
            own = f"head.cohorts.{learner.experience.index}."
            assert all(name.startswith(own) for name in head)
            assert bool(head) == (scenario != "domain")
            assert moved - head == {f"blocks.0.cohorts.0.{name}" for name in rows}
    assert strategy.buffer_bytes == 16 * 8


def test_a_memory_of_values_alone(walk, new_stream) -> None:
    with seeded(0, "init"):
        model = MLPClassifier((6,), 6, partial(PKM, num_experts=16, heads=2, k=4, key_dim=8), width=16)
    for _moment, learner in walk(model, new_stream(), {"s": SparseMemory(**SMALL)}):
        assert learner.model is model


@pytest.mark.parametrize("layer", ["dense", "moe"])
def test_other_layers_are_refused_by_name(train, new_model, new_stream, layer: str) -> None:
    with pytest.raises(InputError, match=rf"strategy=sparse_memory with layer={layer}"):
        train(new_model(layer), new_stream(), {"s": SparseMemory()})


@pytest.mark.parametrize(
    ("options", "key"),
    [({"lr": 0.0}, "lr"), ({"top_t": 0}, "top_t"), ({"score": "idf"}, "score"), ({"rows": "k"}, "rows")],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], key: str) -> None:
    with pytest.raises(InputError) as caught:
        SparseMemory(**options)
    assert caught.value.key == f"strategy.sparse_memory.{key}"
