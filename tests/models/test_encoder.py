"""The masked objective: what is hidden, what is seen of it, what is asked."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import TensorDataset

from cl_moe.errors import InputError
from cl_moe.evaluation import evaluate
from cl_moe.layers import DenseFFN
from cl_moe.learner import Learner
from cl_moe.models import EncoderLM
from cl_moe.models.spans import SpanMasking
from cl_moe.optim import SGD
from cl_moe.seeds import generator, seeded
from cl_moe.strategies import LwF
from cl_moe.strategies.base import Step
from cl_moe.stream import IGNORE, Experience, Stream
from cl_moe.trainer import TrainerSpec


def runs(row: Tensor) -> int:
    """Hidden stretches of a row that is taken for a ring."""
    return int((row & ~row.roll(1)).sum()) if not bool(row.all()) else 1


@settings(max_examples=60)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=5),
    st.floats(0.01, 0.99),
    st.floats(1, 9),
    st.integers(0, 99),
)
def test_so_many_tokens_in_so_many_spans(lengths: list[int], share: float, mean: float, seed: int) -> None:
    hidden = SpanMasking(share, mean)(torch.tensor(lengths), 40, generator(seed))
    for row, length in zip(hidden, lengths, strict=True):
        assert not row[length:].any(), "padding is never hidden"
        wanted = min(max(round(length * share), 1), max(length - 1, 1)) if length else 0
        assert abs(int(row.sum()) - wanted) <= (length * share % 1 == 0.5)
        spans = min(max(round(wanted / mean), 1), max(length - wanted, 1))
        if length:
            assert abs(runs(row[:length]) - spans) <= (wanted / mean % 1 == 0.5)


def test_no_position_is_hidden_more_often_than_another() -> None:
    hidden = SpanMasking()(torch.full((4000,), 20), 20, generator(0)).double().mean(dim=0)
    assert hidden.sub(0.15).abs().max() < 5 * (0.15 * 0.85 / 4000) ** 0.5


def encoder() -> EncoderLM:
    with seeded(0, "init"):
        return EncoderLM((20,), 11, DenseFFN, width=16, num_heads=2, num_blocks=1, slots="all")


def text(rows: int = 6) -> tuple[Tensor, Tensor]:
    inputs = torch.randint(11, (rows, 20), generator=generator(0, "text", rows))
    targets = inputs.roll(-1, dims=1)
    targets[-1, 12:] = IGNORE
    return inputs, targets


def test_the_answer_is_not_shown_and_only_what_is_hidden_is_asked() -> None:
    model, (inputs, targets) = encoder(), text()
    shown, asked = model.pose(inputs, targets, lambda: generator(3))
    hidden = shown == model.mask_token
    assert torch.equal(asked != IGNORE, hidden)
    assert torch.equal(asked[hidden], inputs[hidden])
    assert torch.equal(shown[~hidden], inputs[~hidden])
    assert hidden.sum(dim=1).tolist() == [3, 3, 3, 3, 3, 2]
    other = torch.where(hidden, (inputs + 4) % 11, inputs)
    assert torch.equal(model.pose(other, targets, lambda: generator(3))[0], shown)


def stream() -> Stream:
    parts = [TensorDataset(*text(rows)) for rows in (24, 9)]
    experiences = tuple(Experience(index, f"e{index}", *parts) for index in range(2))
    return Stream("toy", "language", "domain", experiences, 11, (20,))


def learner() -> Learner:
    made = Learner(encoder(), SGD(lr=0.1), {}, stream())
    made.experience = stream()[0]
    return made


def test_the_loss_is_that_of_hidden_tokens_alone() -> None:
    made, (inputs, targets) = learner(), text()
    step = made.training_step((inputs, targets), 0)
    shown, asked = made.model.pose(inputs, targets, made._draw)
    logits, _ = made.model(shown, mask=targets != IGNORE)
    terms = [
        F.cross_entropy(logits[b, s], inputs[b, s])
        for b in range(6)
        for s in range(20)
        if asked[b, s] != IGNORE
    ]
    torch.testing.assert_close(step, torch.stack(terms).mean())


def test_other_tokens_are_hidden_in_every_step_and_experience() -> None:
    made, (inputs, targets) = learner(), text()
    seen = []
    for experience in stream():
        made.experience = experience
        for made.batches in range(3):
            seen.append(made.model.pose(inputs, targets, made._draw)[0])
    assert len({tuple(shown.flatten().tolist()) for shown in seen}) == 6
    made.batches = 2
    assert torch.equal(made.model.pose(inputs, targets, made._draw)[0], seen[-1]), "a restart draws the same"


def test_an_evaluation_asks_the_same_every_time() -> None:
    made = learner()
    spec = TrainerSpec(accelerator="cpu")
    rows = [evaluate(spec.build(), made, stream()[:], 4).row for _ in range(2)]
    assert torch.equal(*rows)
    inputs, targets = stream()[0].test.tensors
    losses = []
    for batch, start in enumerate(range(0, 9, 4)):
        part = slice(start, start + 4)
        shown, asked = made.model.pose(
            inputs[part], targets[part], lambda batch=batch: generator(0, "evaluation", batch)
        )
        logits = made.model.eval()(shown, mask=targets[part] != IGNORE)[0]
        losses.append(F.cross_entropy(logits[asked != IGNORE], asked[asked != IGNORE], reduction="none"))
    assert rows[0][0].item() == pytest.approx(-torch.cat(losses).mean().item(), rel=1e-5)


def test_a_teacher_is_asked_for_what_was_hidden_only() -> None:
    made, (inputs, targets) = learner(), text()
    strategy = LwF(temperature=1.0)
    strategy.begin(made.outlook())
    strategy.end(made.outlook())
    old = made.model(inputs)[0].detach()
    shown, asked = made.model.pose(inputs, targets, lambda: generator(0))
    strategy.teacher.logits = lambda *_: old  # type: ignore[method-assign]
    logits = old + torch.randn(old.shape, generator=generator(1))
    step = Step(made.model, shown, asked, targets != IGNORE, logits, {})
    first = strategy.loss(step)["lwf"]
    elsewhere = torch.where((asked == IGNORE).unsqueeze(-1), logits * 3, logits)
    second = strategy.loss(Step(made.model, shown, asked, targets != IGNORE, elsewhere, {}))["lwf"]
    assert torch.equal(first, second)
    assert first > 0


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"mask_share": 0.0}, "model.mask_share"),
        ({"mask_share": 1.0}, "model.mask_share"),
        ({"span_length": 0.5}, "model.span_length"),
        ({"span_length": float("nan")}, "model.span_length"),
    ],
)
def test_what_cannot_be_hidden_is_refused(options: dict[str, float], key: str) -> None:
    with pytest.raises(InputError) as caught:
        EncoderLM((4,), 5, DenseFFN, width=8, num_heads=2, **options)
    assert caught.value.key == key
