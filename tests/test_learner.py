"""What a scenario withholds: from the answers, from the loss, and over a whole stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.utils.data import TensorDataset

from cl_moe.batches import training_loader
from cl_moe.evaluation import evaluate
from cl_moe.growth import EveryExperience, PastExperts
from cl_moe.growth.adapt import adapt, add_classes, take_census
from cl_moe.layers import MoE, Routing, Switch, TopK, fold_load
from cl_moe.learner import Learner
from cl_moe.models import ContinualModel, Head, MLPClassifier
from cl_moe.optim import SGD, OptimizerSpec
from cl_moe.seeds import generator, seeded
from cl_moe.stream import Experience, Scenario, Stream
from cl_moe.trainer import TrainerSpec


class Echo(ContinualModel):
    """Answers with its inputs: column c of the logits is what the input says of class ``head.classes[c]``."""

    kind = "classification"

    def __init__(self, classes: Sequence[int] = ()) -> None:
        super().__init__()
        self.head = Head(1)
        for label in classes:
            self.head.grow([label])

    def forward(
        self, inputs: Tensor, mask: Tensor | None = None, cohorts: Sequence[int] | None = None
    ) -> tuple[Tensor, dict[int, Routing]]:
        return inputs[:, self.head.classes], {}

    @property
    def feed_forward(self) -> Sequence[torch.nn.Module]:
        return []


def stream_of(scenario: Scenario, num_tasks: int = 3, rows: int = 24, width: int = 6) -> Stream:
    """Tasks of two classes each; in the domain scenario the same two every time."""
    experiences = []
    for index in range(num_tasks):
        classes = (0, 1) if scenario == "domain" else (2 * index, 2 * index + 1)
        parts = []
        for part, size in (("train", rows), ("test", 17)):
            inputs = torch.randn(size, width, generator=generator(0, index, part))
            targets = torch.tensor(classes)[torch.arange(size) % 2]
            inputs[torch.arange(size), targets] += 2
            parts.append(TensorDataset(inputs, targets))
        label = index if scenario == "task" else None
        experiences.append(Experience(index, f"e{index}", parts[0], parts[1], classes, label))
    num_classes = 2 if scenario == "domain" else 2 * num_tasks
    return Stream("toy", "classification", scenario, tuple(experiences), num_classes, (width,))


def learner_of(
    model: ContinualModel, stream: Stream, optimizer: OptimizerSpec | None = None, **options: object
) -> Learner:
    learner = Learner(model, optimizer or SGD(lr=0.1), {}, stream, **options)
    learner.place_classes()
    return learner


LOGITS = torch.randn(60, 6, generator=generator(0, "logits"))
TARGETS = torch.arange(60) % 6


def test_class_incremental_answers_compete_over_all_classes_seen() -> None:
    known = [4, 1, 5, 0]
    learner = learner_of(Echo(known), stream_of("class"))
    right, count = learner.score(learner.model(LOGITS)[0], TARGETS)
    answers = [max(known, key=lambda label: row[label].item()) for row in LOGITS]
    expected = sum(answer == target for answer, target in zip(answers, TARGETS.tolist(), strict=True))
    assert (right.item(), count.item()) == (expected, 60)
    unseen = ~torch.isin(TARGETS, torch.tensor(known))
    right, count = learner.score(learner.model(LOGITS[unseen])[0], TARGETS[unseen])
    assert (right.item(), count.item()) == (0, int(unseen.sum())), "a class without rows is never right"


def test_without_any_class_nothing_is_right() -> None:
    learner = learner_of(Echo(), stream_of("class"))
    right, count = learner.score(learner.model(LOGITS)[0], TARGETS)
    assert (right.item(), count.item()) == (0, 60)


def test_task_incremental_answers_compete_inside_each_sample_s_own_task() -> None:
    order = [2, 3, 0, 1, 4, 5]
    learner = learner_of(Echo(order), stream_of("task"))
    right, _ = learner.score(learner.model(LOGITS)[0], TARGETS)
    expected = 0
    for row, target in zip(LOGITS, TARGETS.tolist(), strict=True):
        rival = target + 1 if target % 2 == 0 else target - 1
        expected += (row[target] > row[rival]).item()
    assert right.item() == expected
    assert expected > learner_of(Echo(order), stream_of("class")).score(LOGITS[:, order], TARGETS)[0]


def test_task_incremental_training_leaves_other_tasks_columns_alone() -> None:
    """A batch may mix tasks, as replay does."""
    learner = learner_of(Echo([2, 3, 0, 1, 4, 5]), stream_of("task"))
    logits = learner.model(LOGITS)[0].clone().requires_grad_()
    loss = learner.task_loss(logits, TARGETS)
    losses = []
    for row, target in zip(LOGITS, TARGETS.tolist(), strict=True):
        own = row[[target - target % 2, target - target % 2 + 1]]
        losses.append(F.cross_entropy(own.double(), torch.tensor(target % 2)))
    assert loss.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, logits)
    column_task = torch.tensor([1, 1, 0, 0, 2, 2])
    assert not gradient[column_task != (TARGETS // 2).unsqueeze(1)].any()
    assert gradient[column_task == (TARGETS // 2).unsqueeze(1)].all()


@pytest.mark.parametrize("scenario", ["class", "domain"])
def test_other_scenarios_train_and_answer_over_all_columns(scenario: Scenario) -> None:
    stream = stream_of(scenario)
    classes = list(range(stream.num_classes))
    learner = learner_of(Echo(classes), stream)
    logits, targets = LOGITS[:, : len(classes)], TARGETS % len(classes)
    assert torch.equal(learner.own_task(logits, targets), logits)
    expected = F.cross_entropy(logits.double(), targets).item()
    assert learner.task_loss(logits, targets).item() == pytest.approx(expected, rel=1e-5)
    right, _ = learner.score(logits, targets)
    assert right.item() == (logits.argmax(1) == targets).sum()


def run_through(
    stream: Stream, router: object = TopK, eval_batch_size: int = 5, optimizer: OptimizerSpec | None = None
) -> tuple[Learner, list[Tensor]]:
    """Train a growing MoE on a stream; the rows of the accuracy matrix."""
    with seeded(0, "init"):
        layer = partial(MoE, num_experts=4, hidden=8, router=router)
        model = MLPClassifier(stream.input_shape, stream.num_classes, layer, width=8)
    spec = TrainerSpec(epochs=2, batch_size=8, accelerator="cpu")
    trainer, learner = spec.build(), learner_of(model, stream, optimizer)
    learner.ledger += add_classes(model, stream.classes_at_start, seed=0)
    rows = [evaluate(trainer, learner, stream[:], eval_batch_size).row]
    for experience in stream:
        census = take_census(model, experience.index, learner.ledger, {})
        learner.ledger += adapt(model, census, EveryExperience(2), PastExperts(), experience.classes, seed=0)
        learner.experience = experience
        spec.raise_epochs(trainer)
        trainer.fit(learner, train_dataloaders=training_loader(experience.train, 8, 0, experience.index))
        rows.append(evaluate(trainer, learner, stream[:], eval_batch_size).row)
    return learner, rows


@pytest.mark.parametrize("scenario", ["class", "domain"])
@pytest.mark.parametrize("labels", [(0, 1, 2), (2, 0, 1), (7, 7, 7)])
def test_task_labels_change_no_class_or_domain_incremental_bit(
    scenario: Scenario, labels: tuple[int, ...]
) -> None:
    stream = stream_of(scenario)
    labelled = [replace(e, task_label=label) for e, label in zip(stream, labels, strict=True)]
    plain, rows = run_through(stream)
    told, rows_told = run_through(replace(stream, experiences=tuple(labelled)))
    assert all(torch.equal(a, b) for a, b in zip(rows, rows_told, strict=True))
    state, state_told = plain.model.state_dict(), told.model.state_dict()
    assert all(torch.equal(state[name], state_told[name]) for name in state)


@pytest.mark.parametrize("scenario", ["class", "domain", "task"])
def test_a_row_weighs_every_example_once(scenario: Scenario) -> None:
    """17 test rows in batches of 5, 5, 5, 2: the mean over rows, not over batches."""
    stream = stream_of(scenario)
    learner, rows = run_through(stream, eval_batch_size=5)
    model = learner.model.eval()
    for experience in stream:
        inputs, targets = experience.test.tensors
        right, count = learner.score(model(inputs)[0], targets)
        assert rows[-1][experience.index].item() == right.item() / count.item()
    if scenario == "class":
        assert rows[0].tolist() == [0, 0, 0], "before any training no class is known"
        assert rows[1][1:].tolist() == [0, 0]
        assert rows[2][2].item() == 0
    assert rows[-1].dtype == torch.float64


def test_an_evaluation_leaves_no_trace_and_counts_every_slot() -> None:
    stream = stream_of("class")
    learner, _ = run_through(stream)
    trainer = TrainerSpec(accelerator="cpu").build()
    before = {name: value.clone() for name, value in learner.model.state_dict().items()}
    torch.manual_seed(4)
    expected = torch.rand(2)
    torch.manual_seed(4)
    found = evaluate(trainer, learner, stream[:], 5)
    assert torch.equal(torch.rand(2), expected), "it drew from the global generator"
    assert all(torch.equal(value, before[name]) for name, value in learner.model.state_dict().items())
    for experience, load in zip(stream, found.loads[0], strict=True):
        whole = fold_load(learner.model.eval()(experience.test.tensors[0])[1][0])
        torch.testing.assert_close(load.score, whole.score, rtol=1e-5, atol=1e-6)
        assert load.count.sum() == 17 * 2


def test_parts_of_a_cut_experience_share_one_evaluation() -> None:
    stream = stream_of("class")
    learner, _ = run_through(stream)
    trainer = TrainerSpec(accelerator="cpu").build()
    row = evaluate(trainer, learner, stream[:], 5).row
    doubled = [e for e in stream for _ in range(2)]
    found = evaluate(trainer, learner, doubled, 5)
    assert torch.equal(found.row, row.repeat_interleave(2))
    assert len(found.loads[0]) == 6


def test_training_does_not_hang_on_what_was_drawn_before() -> None:
    """The Switch router's jitter draws from the global generator, which each fit seeds for itself."""
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        learner, _ = run_through(stream_of("class"), router=partial(Switch, jitter=0.3))
        states.append(torch.cat([value.flatten() for value in learner.model.state_dict().values()]))
    assert torch.equal(*states)


def test_carried_momentum_is_not_reset_momentum() -> None:
    ends = {}
    for state in ("carry", "reset"):
        learner, _ = run_through(stream_of("class"), optimizer=SGD(lr=0.05, momentum=0.9, state=state))
        ends[state] = learner.model.stem.weight.detach()
        assert bool(learner.optimizer_state) == (state == "carry")
    assert not torch.equal(ends["carry"], ends["reset"])
