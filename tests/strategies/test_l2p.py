"""Learning to prompt: the chosen prompts and the loss by a loop, and that the body stands still."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from cl_moe.errors import InputError
from cl_moe.layers import DenseFFN
from cl_moe.models import PatchTransformer
from cl_moe.seeds import seeded
from cl_moe.strategies import L2P, Step, Strategy
from cl_moe.strategies.l2p import choose
from cl_moe.stream import Stream


@pytest.fixture
def images(new_stream) -> Stream:
    """The small stream with inputs of 4 x 4: six numbers and ten zeros."""

    def padded(data):
        return type(data)(F.pad(data.tensors[0], (0, 10)), data.tensors[1])

    stream = new_stream()
    experiences = [dataclasses.replace(e, train=padded(e.train), test=padded(e.test)) for e in stream]
    return dataclasses.replace(stream, experiences=tuple(experiences), input_shape=(16,))


def body() -> PatchTransformer:
    with seeded(0, "init"):
        return PatchTransformer((16,), 6, DenseFFN, width=8, num_heads=2, ffn_hidden=12)


class Watch(Strategy):
    """The term that a step was given."""

    def __init__(self, inner: L2P) -> None:
        self.inner, self.terms = inner, list[float]()

    def check(self, setting: Any) -> None:
        self.inner.check(setting)

    def begin(self, outlook: Any) -> None:
        self.inner.begin(outlook)

    def loss(self, step: Step) -> dict[str, Tensor]:
        query = step.model.eval().read(step.inputs)[0].mean(1)
        step.model.train()
        terms = self.inner.loss(step)
        if terms:
            near = F.cosine_similarity(query[:, None], self.inner.keys_MD[None], dim=2)
            far = sum(1 - near.sort(dim=1, descending=True).values[:, n] for n in range(2))
            torch.testing.assert_close(terms["l2p"], 0.3 * far.mean())
            self.terms.append(terms["l2p"].item())
        return terms

    def gradients(self, model: Any) -> None:
        self.inner.gradients(model)


def test_prompts_are_chosen_and_read_as_in_the_paper(images) -> None:
    model, strategy = body(), L2P(pool_size=4, length=3, top_n=2, pull=0.3)
    plain = body()
    strategy.check(type("Setting", (), {"model": model, "names": ("l2p",)}))
    for one in (model, plain):
        one.head.grow([0, 1])
    plain.load_state_dict(model.state_dict())
    inputs = images[0].train.tensors[0][:5]
    torch.testing.assert_close(model(inputs)[0], plain(inputs)[0], rtol=0, atol=0)  # not in use yet
    strategy.active = True
    for row in range(5):
        x = plain.stem(plain.patches(inputs[row : row + 1])) + plain.positions.weight
        query = plain.read(inputs[row : row + 1])[0].mean(1)
        near = F.cosine_similarity(query, strategy.keys_MD, dim=1)
        best = near.argsort(descending=True)[:2]
        x = torch.cat([*(strategy.prompts_MLD[i : i + 1] for i in best), x], dim=1)
        behind, _ = plain._through_blocks(x, None, None)
        expected = plain.head(behind[:, :6].mean(1))
        torch.testing.assert_close(model(inputs[row : row + 1])[0], expected, rtol=1e-4, atol=1e-5)


def test_the_body_stands_still_and_prompts_learn(walk, images) -> None:
    strategy = L2P(pool_size=4, length=3, top_n=2, pull=0.3)
    watch, before = Watch(strategy), dict[str, Tensor]()
    prompts = keys = torch.empty(0)
    for moment, learner in walk(body(), images, {"s": watch}, momentum=0.9):
        state, index = learner.model.state_dict(), learner.experience.index
        if moment == "adapted":
            before = {name: value.clone() for name, value in state.items()}
            prompts, keys = strategy.prompts_MLD.detach().clone(), strategy.keys_MD.detach().clone()
            continue
        moved = {name for name, value in state.items() if not torch.equal(value, before[name])}
        assert all(name.startswith("head.") for name in moved) == (index > 0)
        assert torch.equal(prompts, strategy.prompts_MLD) == (index == 0)
        assert torch.equal(keys, strategy.keys_MD) == (index == 0)
    assert len(watch.terms) == 2 * (2 + 3)
    size = (4 * 3 + 4) * 8
    assert strategy.buffer_bytes == 3 * 4 * size + 2 * 4  # moments, and a step count for each of the two
    assert strategy.costs(learner.model) == {"cost/prompt_params": size}


def test_restarts_change_no_bit(walk, images) -> None:
    def parts():
        return body(), {"l2p": L2P(pool_size=4, length=3, top_n=2)}

    def rows(restart: bool) -> list[Tensor]:
        model, strategies = parts()
        found = []
        for moment, learner in walk(model, images, strategies, rebuild=parts if restart else None):
            if moment == "trained":
                learner.model.eval()
                with torch.no_grad():
                    found.append(learner.model(images[0].test.tensors[0])[0])
                learner.model.train()
        return found

    assert all(torch.equal(a, b) for a, b in zip(rows(False), rows(True), strict=True))


def test_ties_and_orders_of_keys() -> None:
    keys = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    prompts = torch.arange(6.0).reshape(3, 1, 2)
    chosen = choose(torch.tensor([[0.0, 2.0]]), keys, prompts, 1)
    assert chosen.prompts.tolist() == [[[2.0, 3.0]]]
    assert chosen.distance.tolist() == [0.0]


def test_what_it_cannot_serve_is_refused(train, new_model, new_stream) -> None:
    with pytest.raises(InputError, match="l2p with MLPClassifier"):
        train(new_model(), new_stream(), {"s": L2P()})
    for options, key in (({"top_n": 11}, "top_n"), ({"lr": 0.0}, "lr"), ({"length": 0}, "length")):
        with pytest.raises(InputError) as caught:
            L2P(**options)
        assert caught.value.key == f"strategy.l2p.{key}"
