"""Bias correction: what is held out, the fit against Newton's method, and that answers are corrected."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from cl_moe.errors import InputError
from cl_moe.seeds import generator
from cl_moe.strategies import BiC, Replay, WeightAligning
from cl_moe.strategies.bic import fit


def test_what_is_held_out_is_never_trained_on_and_nothing_is_lost(new_stream) -> None:
    stream, strategy = new_stream(), BiC(memory_size=12, held_out=0.2)
    seen = strategy.view(stream)
    for experience, whole in zip(seen, stream, strict=True):
        held = strategy._held[experience.index].tensors
        rows = [*experience.train.tensors[0].tolist(), *held[0].tolist()]
        assert sorted(rows) == sorted(whole.train.tensors[0].tolist())
        assert held[1].unique().tolist() == list(whole.classes)
        assert len(held[0]) == pytest.approx(0.2 * len(whole.train), abs=1)
    again = BiC(memory_size=12, held_out=0.2)
    again.view(stream)
    assert torch.equal(again._held[1].tensors[0], strategy._held[1].tensors[0])


def test_the_fit_is_the_minimum() -> None:
    """By Newton's method on the two numbers, with derivatives by autograd."""
    logits = torch.randn(40, 5, generator=generator(1, "logits"), dtype=torch.float64) * 2
    targets, new = torch.arange(40) % 5, [1, 4]
    pair = torch.tensor([1.0, 0.0], dtype=torch.float64)
    is_new = torch.tensor([False, True, False, False, True])

    def loss(pair: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(torch.where(is_new, pair[0] * logits + pair[1], logits), targets)

    for _ in range(20):
        slope = torch.autograd.functional.jacobian(loss, pair)
        pair = pair - torch.linalg.solve(torch.autograd.functional.hessian(loss, pair), slope)
    assert torch.autograd.functional.jacobian(loss, pair).abs().max() < 1e-10
    assert fit(logits, targets, new) == pytest.approx(pair.tolist(), abs=1e-4)


def test_corrections_by_experience(walk, new_model, new_stream) -> None:
    strategy = BiC(memory_size=12, held_out=0.2)
    strategies = {"replay": Replay(memory_size=10), "bic": strategy}
    for moment, learner in walk(new_model(), strategy.view(new_stream()), strategies):
        if moment == "adapted":
            continue
        index, head = learner.experience.index, learner.model.head
        assert [labels for labels, _, _ in strategy.corrections] == [[2, 3], [4, 5]][:index]
        sizes = {label: len(rows) for label, rows in strategy.memory.items()}
        assert set(sizes) == set(head.classes)
        assert all(1 <= size <= 12 // len(sizes) for size in sizes.values())
        raw = torch.randn(7, len(head.classes))
        answer = strategy.predict(learner.model, torch.zeros(7, 16), raw)
        torch.testing.assert_close(answer[:, :2], raw[:, :2])
        for place, (labels, alpha, beta) in enumerate(strategy.corrections):
            columns = [2 * place + 2, 2 * place + 3]
            assert [head.classes[c] for c in columns] == labels
            torch.testing.assert_close(answer[:, columns], alpha * raw[:, columns] + beta)
    assert any(abs(alpha - 1) + abs(beta) > 0.05 for _, alpha, beta in strategy.corrections)
    assert strategy.buffer_bytes == sum(rows.numel() * 4 for rows in strategy.memory.values())


def test_what_it_cannot_serve_is_refused(train, new_model, new_stream) -> None:
    for scenario in ("task", "domain"):
        with pytest.raises(InputError, match="strategy=bic with"):
            train(new_model(), new_stream(scenario), {"s": BiC(memory_size=12)})
    with pytest.raises(InputError, match="weight_aligning"):
        train(new_model(), new_stream(), {"s": BiC(memory_size=12), "weight_aligning": WeightAligning()})
    with pytest.raises(InputError, match="a memory of 5 for 6 classes"):
        train(new_model(), new_stream(), {"s": BiC(memory_size=5)})
    with pytest.raises(InputError, match=r"strategy\.bic\.held_out"):
        BiC(held_out=1.0)
