"""Distillation of a finished run: the two shares by hand, the head's rows, and what must not happen.

Legend: B batch, C columns.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from cl_moe.errors import InputError
from cl_moe.layers import DenseFFN
from cl_moe.models import EncoderLM
from cl_moe.strategies import DistillFrom, Outlook, Step
from cl_moe.strategies.distill_from import OUTSIDE
from cl_moe.stream import IGNORE

INPUTS = torch.randn(16, 6, generator=torch.Generator().manual_seed(4))
TARGETS = torch.arange(16) % 4


class FakeExperience:
    index = 0
    classes = (0, 1, 2, 3)


def outlook_of(model, groups: Tensor | None = None) -> Outlook:
    return Outlook(model, FakeExperience(), "classification", 0, groups)


def begun(new_model, classes: list[int], known: list[int], groups: Tensor | None = None, **options: float):
    """A dense student with rows for ``classes``, and a teacher with experts that knows ``known``."""
    teacher, student = new_model("moe", seed=1), new_model("dense")
    teacher.head.grow(known)
    student.head.grow(classes)
    strategy = DistillFrom(**options)
    strategy.learn_from(teacher)
    strategy.begin(outlook_of(student, groups))
    return strategy, teacher, student


def step_of(student) -> Step:
    logits, routings = student(INPUTS)
    columns = torch.tensor([student.head.classes.index(label) for label in TARGETS.tolist()])
    task = torch.nn.functional.cross_entropy(logits, columns)
    return Step(student, INPUTS, TARGETS, None, logits, routings, task)


def softmax(x: np.ndarray) -> np.ndarray:
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def kl(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> float:
    p, q = (softmax(x.detach().double().numpy() / temperature) for x in (teacher, student))
    return temperature**2 * float((p * np.log(p / q)).sum(-1).mean())


@pytest.mark.parametrize(("hard", "soft", "temperature"), [(0.75, 0.25, 1.0), (0.0, 1.0, 3.0)])
def test_the_two_shares_by_hand(new_model, hard: float, soft: float, temperature: float) -> None:
    options = {"hard": hard, "soft": soft, "temperature": temperature}
    strategy, teacher, student = begun(new_model, [0, 1, 2, 3], [0, 1, 2, 3], **options)
    step = step_of(student)
    whole = step.task_loss + sum(strategy.loss(step).values())
    expected = hard * step.task_loss.item() + soft * kl(teacher(INPUTS)[0], step.logits, temperature)
    assert whole.item() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert kl(teacher(INPUTS)[0], step.logits) > 1e-3


def test_the_published_shares_are_the_defaults() -> None:
    assert (DistillFrom().hard, DistillFrom().soft, DistillFrom().temperature) == (0.75, 0.25, 1.0)


def test_columns_meet_by_class_wherever_they_stand(new_model) -> None:
    strategy, teacher, student = begun(new_model, [3, 0, 1, 2], [1, 5, 3, 2])
    step = step_of(student)
    answer = teacher(INPUTS)[0][:, [2, 0, 3]]  # 3, 1, 2
    expected = 0.25 * kl(answer, step.logits[:, [0, 2, 3]])
    assert strategy.loss(step)["distill_soft"].item() == pytest.approx(expected, rel=1e-5)


def test_a_teacher_that_knows_no_class_of_now_leaves_the_task_loss_alone(new_model) -> None:
    strategy, _, student = begun(new_model, [0, 1, 2, 3], [4, 5])
    assert strategy.loss(step_of(student)) == {}


def test_in_the_task_scenario_only_the_examples_own_columns_count(new_model) -> None:
    groups = torch.tensor([0, 0, 1, 1, 2, 2])
    strategy, teacher, student = begun(new_model, [0, 1, 2, 3], [0, 1, 2, 3], groups)
    step = step_of(student)
    answer, terms = teacher(INPUTS)[0], []
    for row, label in enumerate(TARGETS.tolist()):
        own = [0, 1] if label < 2 else [2, 3]
        terms.append(kl(answer[row : row + 1, own], step.logits[row : row + 1, own]))
    term = strategy.loss(step)["distill_soft"]
    assert term.item() == pytest.approx(0.25 * sum(terms) / 16, rel=1e-5)
    (gradient,) = torch.autograd.grad(term, step.logits)
    assert gradient.isfinite().all()
    assert (gradient[TARGETS < 2][:, 2:] == 0).all()
    assert torch.tensor(OUTSIDE).isfinite()


def test_rows_begin_as_the_teachers_and_only_once(new_model) -> None:
    strategy, teacher, student = begun(new_model, [1, 0], [0, 1, 2, 3])
    theirs = teacher.head.cohorts[0].weight
    assert torch.equal(student.head.cohorts[0].weight, theirs[[1, 0]])
    with torch.no_grad():
        student.head.cohorts[0].weight.add_(1.0)  # it learns
    learnt = student.head.cohorts[0].weight.clone()
    student.head.grow([2, 4])
    fresh = student.head.cohorts[1].weight[1].clone()
    state = strategy.state_dict()
    again = DistillFrom()
    again.learn_from(teacher)
    again.load_state_dict(state)  # as a restart at the boundary has it
    again.begin(outlook_of(student))
    assert torch.equal(student.head.cohorts[0].weight, learnt)
    assert torch.equal(student.head.cohorts[1].weight[0], theirs[2])
    assert torch.equal(student.head.cohorts[1].weight[1], fresh), "nobody to learn class 4 from"


def test_the_teacher_stands_still_and_is_counted(new_model) -> None:
    strategy, teacher, student = begun(new_model, [0, 1, 2, 3], [0, 1, 2, 3])
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    sum(strategy.loss(step_of(student)).values()).backward()
    assert not teacher.training
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    sizes = [sum(p.numel() for p in model.parameters()) for model in (teacher, student)]
    assert strategy.costs(student) == {
        "cost/teacher_params": sizes[0],
        "cost/compression": pytest.approx(sizes[0] / sizes[1]),
    }
    assert strategy.buffer_bytes == 4 * sizes[0]


def test_without_a_teacher_nothing_begins(new_model) -> None:
    with pytest.raises(InputError, match="change: distill"):
        DistillFrom().begin(outlook_of(new_model()))


@pytest.mark.parametrize("options", [{"hard": -1.0}, {"soft": float("nan")}, {"temperature": 0.0}])
def test_shares_that_cannot_be_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(InputError, match=r"strategy\.distill_from"):
        DistillFrom(**options)


def test_a_text_of_which_nothing_is_asked_has_no_share() -> None:
    teacher, student = (EncoderLM((6,), 7, DenseFFN, width=8, num_heads=2, num_blocks=1) for _ in range(2))
    strategy = DistillFrom()
    strategy.learn_from(teacher)
    strategy.begin(outlook_of(student))
    inputs = torch.randint(7, (2, 6))
    logits, routings = student(inputs)
    for asked in (torch.zeros(2, 6, dtype=torch.bool), torch.arange(12).view(2, 6) == 3):
        targets = inputs.masked_fill(~asked, IGNORE)
        losses = strategy.loss(Step(student, inputs, targets, None, logits, routings, logits.sum()))
        assert bool(losses) == bool(asked.any())
        assert all(loss.isfinite() for loss in losses.values())
