"""GEM and A-GEM: the projection against a general solver, and that no memory's loss is to rise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor

from cl_moe.errors import InputError
from cl_moe.growth import EveryExperience, PastExperts
from cl_moe.strategies import AGEM, GEM, Naive, Strategy
from cl_moe.strategies.gem import dual


@given(st.integers(0, 10_000), st.integers(1, 5), st.sampled_from([0.0, 0.5]), st.booleans())
def test_the_quadratic_program_by_another_solver(seed: int, past: int, margin: float, twins: bool) -> None:
    draw = np.random.default_rng(seed)
    G, g = draw.normal(size=(past, 7)), draw.normal(size=7)
    if twins and past > 1:
        G[-1] = G[0]  # memories that agree
    v = dual(G @ G.T, G @ g, margin)

    def cost(w: np.ndarray) -> float:
        return 0.5 * float(w @ G @ G.T @ w + 2 * (G @ g) @ w)

    slope, bounds = (lambda w: G @ G.T @ w + G @ g), [(margin, None)] * past
    options = {"ftol": 1e-15, "gtol": 1e-10, "maxiter": 10_000}
    other = minimize(cost, np.full(past, margin + 0.1), jac=slope, bounds=bounds, options=options)
    assert (v >= margin).all()
    assert cost(v) <= other.fun + 1e-7 * (1 + abs(other.fun))
    turned = g + G.T @ v
    assert (G @ turned >= -1e-8).all(), "no old loss rises"
    if margin == 0.0:
        grid = draw.normal(size=(2000, 7)) * 2 + g
        bearable = grid[(grid @ G.T >= 0).all(axis=1)]
        nearest = np.linalg.norm(turned - g)
        assert (np.linalg.norm(bearable - g, axis=1) >= nearest - 1e-9).all(), (
            "and none that bears it is nearer"
        )


class Watch(Strategy):
    """Gradients before and after, and the memories' gradients by a loop of its own."""

    def __init__(self, inner: GEM | AGEM) -> None:
        self.inner, self.steps = inner, list[tuple[Tensor, Tensor, list[Tensor]]]()

    def begin(self, outlook: Any) -> None:
        self.inner.begin(outlook)

    def gradients(self, model: Any) -> None:
        before = flat(model)
        memories = self.inner.memories if isinstance(self.inner, GEM) else [self.inner.memory.columns]
        past = [loss_gradient(model, *m) for m in memories if m]
        self.inner.gradients(model)
        if past:
            self.steps.append((before, flat(model), past))

    def end(self, outlook: Any) -> None:
        self.inner.end(outlook)


def flat(model: Any) -> Tensor:
    return torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()]
    ).clone()


def loss_gradient(model: Any, inputs: Tensor, targets: Tensor) -> Tensor:
    columns = torch.tensor([model.head.classes.index(label) for label in targets.tolist()])
    loss = F.cross_entropy(model(inputs)[0], columns)
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    pairs = zip(grads, model.parameters(), strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])


def nearest(g: np.ndarray, G: np.ndarray) -> np.ndarray:
    """v >= 0 of the nearest g + G'v by a solver for bounded problems."""
    start, bounds = np.full(len(G), 0.1), [(0, None)] * len(G)
    return minimize(
        lambda w: float(((g + w @ G) ** 2).sum()), start, bounds=bounds, options={"ftol": 1e-14}
    ).x


def test_gem_turns_a_gradient_only_as_far_as_it_must(train, new_model, new_stream) -> None:
    watch = Watch(GEM(memory_size=12, margin=0.0))
    train(new_model(), new_stream(), {"gem": watch}, epochs=3)
    turned = 0
    for before, after, past in watch.steps:
        G = torch.stack(past).double()
        along = G @ before.double()
        if (along >= 0).all():
            assert torch.equal(before, after), "what harms nobody stays as it is, to its bits"
            continue
        turned += 1
        assert (G @ after.double() >= -1e-4).all()
        v = nearest(before.double().numpy(), G.numpy())
        expected = before.double() + torch.tensor(v) @ G
        torch.testing.assert_close(after.double(), expected, rtol=1e-3, atol=1e-4)
    assert turned > 3


def test_agem_takes_out_what_points_against_the_memory(train, new_model, new_stream) -> None:
    watch = Watch(AGEM(memory_size=12, sample_size=12))  # the sample is the whole memory
    train(new_model(), new_stream(), {"agem": watch}, epochs=3)
    turned = 0
    for before, after, (r,) in watch.steps:
        along = float(before.double() @ r.double())
        if along < -1e-6:
            turned += 1
            expected = before - along / float(r.double() @ r.double()) * r
            torch.testing.assert_close(after, expected, rtol=1e-3, atol=1e-5)
            assert abs(float(after.double() @ r.double())) < 1e-4
        elif along > 1e-6:
            assert torch.equal(before, after)
    assert turned > 3


def test_gem_shares_its_memory_evenly(walk, new_model, new_stream) -> None:
    gem, sizes = GEM(memory_size=11), []
    stream = new_stream()
    for moment, _ in walk(new_model(), stream, {"gem": gem}):
        if moment == "trained":
            sizes.append([len(memory[0]) for memory in gem.memories])
    assert sizes == [[11], [6, 5], [4, 4, 3]]
    for memory, experience in zip(gem.memories, stream, strict=True):
        known = {tuple(row.tolist()) for row in experience.train.tensors[0]}
        rows = [tuple(row.tolist()) for row in memory[0]]
        assert len(set(rows)) == len(rows)
        assert set(rows) <= known
    assert gem.buffer_bytes == 11 * (6 * 4 + 8)


@pytest.mark.parametrize("make", [lambda: GEM(memory_size=30), lambda: AGEM(memory_size=30)])
@pytest.mark.parametrize("layer", ["dense", "moe", "peer"])
def test_it_acts(train, new_model, new_stream, growing, make, layer: str) -> None:
    """Old classes are answered better than without it, also while experts are born and frozen."""
    stream, options = new_stream(), (growing[layer], PastExperts())

    def old_loss(strategy: Strategy) -> float:
        model = train(new_model(layer), stream, {"s": strategy}, *options, epochs=5).model.eval()
        inputs, targets = stream[0].train.tensors
        return F.cross_entropy(model(inputs)[0], targets).item()

    assert old_loss(make()) < 0.9 * old_loss(Naive())


def test_frozen_experts_stay_to_the_bit(walk, new_model, new_stream) -> None:
    kept: dict[str, Tensor] = {}
    schedule = EveryExperience(2)
    for moment, learner in walk(new_model("moe"), new_stream(), {"g": GEM(30)}, schedule, PastExperts()):
        still = {n: p for n, p in learner.model.named_parameters() if not p.requires_grad}
        if moment == "adapted":
            kept = {name: p.detach().clone() for name, p in still.items()}
        assert all(torch.equal(still[name], value) for name, value in kept.items())
    assert kept


def test_what_cannot_be_is_refused(new_model, new_stream, train) -> None:
    with pytest.raises(InputError, match=r"strategy\.gem\.margin"):
        GEM(margin=-1.0)
    with pytest.raises(InputError, match=r"strategy\.gem\.memory_size"):
        GEM(memory_size=0)
    with pytest.raises(InputError, match=r"strategy\.agem\.sample_size"):
        AGEM(sample_size=0)
    with pytest.raises(InputError, match="2 for 3 experiences"):
        train(new_model(), new_stream(), {"gem": GEM(memory_size=2)})
