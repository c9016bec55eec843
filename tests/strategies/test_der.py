"""DER and DER++: the two terms by hand, the reservoir along the way, columns born later, and that it acts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from cl_moe.errors import InputError
from cl_moe.strategies import DER, Naive, Step, Strategy


class Watch(Strategy):
    """What the inner strategy kept before each step, and what it then asked for."""

    def __init__(self, inner: DER) -> None:
        self.inner, self.seen = inner, list[dict[str, Any]]()

    def begin(self, outlook: Any) -> None:
        self.inner.begin(outlook)
        self.outlook = outlook

    def loss(self, step: Step) -> dict[str, Tensor]:
        memory, draw = [c.clone() for c in self.inner.memory.columns], self.inner._draw.get_state()
        terms = self.inner.loss(step)
        self.seen.append({"memory": memory, "draw": draw, "terms": terms, "by_hand": {}})
        if terms:
            self.seen[-1]["by_hand"] = self.by_hand(step, memory, draw)
        return terms

    def by_hand(self, step: Step, memory: list[Tensor], draw: Tensor) -> dict[str, float]:
        """Both terms, row by row."""
        generator = torch.Generator()
        generator.set_state(draw)
        rows = [torch.randint(len(memory[0]), (len(step.targets),), generator=generator) for _ in range(2)]
        model, away, labels = step.model, [], []
        with torch.no_grad():
            for row in rows[0].tolist():
                now = model(memory[0][row : row + 1])[0][0]
                then = memory[2][row]
                away += [(z - (then[c] if c < len(then) else 0.0)) ** 2 for c, z in enumerate(now)]
            for row in rows[1].tolist():
                column = torch.tensor([model.head.classes.index(memory[1][row].item())])
                labels.append(F.cross_entropy(model(memory[0][row : row + 1])[0], column))
        found = {"der_logits": self.inner.alpha * torch.stack(away).mean().item()}
        found["der_labels"] = self.inner.beta * torch.stack(labels).mean().item()
        return found

    def end(self, outlook: Any) -> None:
        self.inner.end(outlook)


def test_the_two_terms_by_hand(train, new_model, new_stream) -> None:
    watch = Watch(DER(memory_size=15, alpha=0.3, beta=0.7))
    train(new_model(), new_stream(), {"der": watch}, epochs=2)
    assert watch.seen[0]["terms"] == {}
    for seen in watch.seen[1:]:
        for name, term in seen["terms"].items():
            assert term.item() == pytest.approx(seen["by_hand"][name], rel=1e-4, abs=1e-7)
    assert all(term > 0 for term in watch.seen[-1]["terms"].values())


class Book(Strategy):
    """Every answer of every step, as it was given."""

    def __init__(self) -> None:
        self.rows: list[tuple[tuple[float, ...], int, list[float]]] = []

    def loss(self, step: Step) -> dict[str, Tensor]:
        for x, y, z in zip(step.inputs, step.targets, step.logits.detach(), strict=True):
            self.rows.append((tuple(x.tolist()), y.item(), z.tolist()))
        return {}


def test_answers_are_kept_as_they_were_given_on_the_way(train, new_model, new_stream) -> None:
    book, der = Book(), DER(memory_size=20)
    train(new_model(), new_stream(), {"der": der, "book": book}, epochs=3)
    given = {(x, y, tuple(z + [0.0] * (6 - len(z)))) for x, y, z in book.rows}
    kept = [
        (tuple(x.tolist()), y.item(), tuple(z.tolist())) for x, y, z in zip(*der.memory.columns, strict=True)
    ]
    assert set(kept) <= given
    assert len(kept) == 20
    assert der.memory.seen == len(book.rows) == 3 * (24 + 16 + 20)
    assert der.buffer_bytes == 20 * (6 * 4 + 8 + 6 * 4)


def test_kept_at_the_end_each_example_stands_once_with_the_last_answer(walk, new_model, new_stream) -> None:
    der, stream = DER(memory_size=1000, keep="end"), new_stream()
    for moment, learner in walk(new_model(), stream, {"der": der}, epochs=3):
        if moment == "trained":
            size = len(stream[learner.experience.index].train)
            inputs, targets, logits = (column[-size:] for column in der.memory.columns)
            answer = learner.model.eval()(inputs)[0].detach()
            torch.testing.assert_close(logits, answer)
            rows = {tuple(row.tolist()) for row in learner.experience.train.tensors[0]}
            assert {tuple(row.tolist()) for row in inputs} == rows
            assert len(targets) == len(rows)
            learner.model.train()
    assert der.memory.seen == 60


@pytest.mark.parametrize(
    ("scenario", "options"),
    [
        *((scenario, {}) for scenario in ("class", "task", "domain")),
        ("class", {"beta": 0.0, "alpha": 1.0, "keep": "end"}),
        ("domain", {"keep": "end"}),
    ],
)
def test_it_acts(train, new_model, new_stream, scenario: str, options: dict[str, Any]) -> None:
    stream = new_stream(scenario)
    inputs, targets = stream[0].train.tensors

    def old_loss(strategy: Strategy) -> float:
        learner = train(new_model("moe"), stream, {"s": strategy}, epochs=5)
        learner.place_classes()
        return learner.task_loss(learner.model.eval()(inputs)[0], targets).item()

    assert old_loss(DER(memory_size=30, **options)) < 0.95 * old_loss(Naive())


def test_without_both_strengths_it_is_naive(train, new_model, new_stream) -> None:
    def weights(strategy: Strategy) -> Tensor:
        model = train(new_model(), new_stream(), {"s": strategy}).model
        return torch.cat([p.flatten() for p in model.parameters()])

    assert torch.equal(weights(DER(alpha=0.0, beta=0.0)), weights(Naive()))


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"alpha": -1.0}, "alpha"),
        ({"beta": float("nan")}, "beta"),
        ({"memory_size": 0}, "memory_size"),
        ({"keep": "both"}, "keep"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], key: str) -> None:
    with pytest.raises(InputError) as caught:
        DER(**options)
    assert caught.value.key == f"strategy.der.{key}"
