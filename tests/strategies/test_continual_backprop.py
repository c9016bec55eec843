"""Continual backpropagation: utilities, ages and replacements by a loop over units."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from cl_moe.errors import InputError
from cl_moe.layers import DenseFFN
from cl_moe.models import MLPClassifier
from cl_moe.seeds import seeded
from cl_moe.strategies import ContinualBackprop, Strategy

RATE, MATURITY, DECAY = 0.2, 2, 0.5


class Oracle(Strategy):
    """The algorithm unit by unit, held against the strategy's state and what became of the weights."""

    def __init__(self, inner: ContinualBackprop) -> None:
        self.inner, self.utility, self.age, self.credit = inner, {}, {}, {}
        self.replaced, self.due = 0, False

    def begin(self, outlook: Any) -> None:
        self.inner.begin(outlook)
        self.model = outlook.model
        for name, units in self.inner._units.items():
            self.utility.setdefault(name, [0.0] * units.made_by[0].out_features)
            self.age.setdefault(name, [0] * units.made_by[0].out_features)
            self.credit.setdefault(name, 0.0)

    def batch(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        before = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        self.inner.batch(inputs, targets)
        chosen = self._choose() if self.due else {}
        self.due = False
        expected_same = {n: torch.ones_like(p, dtype=torch.bool) for n, p in before.items()}
        after = dict(self.model.named_parameters())
        makers = {
            "blocks.0.linear_in": "stem",
            "blocks.0.linear_out": "blocks.0.linear_in",
            "head": "blocks.0.linear_out",
        }
        reads = {maker: name for name, maker in makers.items()}
        for name, units in chosen.items():
            maker = makers[name]
            readers = [n for n in before if n.startswith(name + ".") and n.endswith("weight")]
            for unit in units:
                for reader in readers:
                    fresh = chosen[reads[name]] if name in reads else []  # drawn anew themselves
                    old = [row for row in range(len(after[reader])) if row not in fresh]
                    assert (after[reader][old, unit] == 0).all()
                    expected_same[reader][:, unit] = False
                assert not torch.equal(after[f"{maker}.weight"][unit], before[f"{maker}.weight"][unit])
                expected_same[f"{maker}.weight"][unit] = False
                expected_same[f"{maker}.bias"][unit] = False
        for name, same in expected_same.items():
            assert torch.equal(after[name][same], before[name][same]), name
        self.inputs = inputs
        self.read = {n: self._weights(n).abs().sum(0) for n in self.utility}
        return inputs, targets

    def _choose(self) -> dict[str, list[int]]:
        chosen = {}
        for name, ages in self.age.items():
            mature = [u for u, age in enumerate(ages) if age > MATURITY]
            self.credit[name] += RATE * len(mature)
            count = min(int(self.credit[name]), len(mature))
            self.credit[name] -= count
            chosen[name] = sorted(mature, key=lambda u, n=name: (self.utility[n][u], u))[:count]
            for unit in chosen[name]:
                self.utility[name][unit], ages[unit] = 0.0, 0
            self.replaced += count
        return chosen

    def _weights(self, name: str) -> Tensor:
        if name == "head":
            return torch.cat([c.weight.detach() for c in self.model.head.cohorts])
        return self.model.get_submodule(name).weight.detach()

    def gradients(self, model: Any) -> None:
        with torch.no_grad():
            stem = torch.relu(model.stem(self.inputs))
            inside = model.blocks[0].activation(model.blocks[0].linear_in(stem))
            out = torch.relu(model.blocks[0].linear_out(inside))
        active = {"blocks.0.linear_in": stem, "blocks.0.linear_out": inside, "head": out}
        self.inner.gradients(model)
        for name, values in self.utility.items():
            for unit in range(len(values)):
                use = active[name][:, unit].abs().mean() * self.read[name][unit]
                values[unit] = DECAY * values[unit] + (1 - DECAY) * use.item()
                self.age[name][unit] += 1
            torch.testing.assert_close(self.inner.utility[name].tolist(), values, rtol=1e-4, atol=1e-6)
            assert self.inner.age[name].tolist() == self.age[name]
        self.due = True

    def end(self, outlook: Any) -> None:
        self.inner.end(outlook)
        if self.due:
            self._choose()
        self.due = False


def test_units_by_a_loop(train, new_stream) -> None:
    with seeded(0, "init"):
        model = MLPClassifier((6,), 6, partial(DenseFFN, hidden=5), width=7)
    strategy = ContinualBackprop(RATE, MATURITY, DECAY)
    oracle = Oracle(strategy)
    train(model, new_stream(), {"s": oracle})
    assert set(oracle.utility) == {"blocks.0.linear_in", "blocks.0.linear_out", "head"}
    assert oracle.replaced > 5
    assert strategy.buffer_bytes == (7 + 5 + 7) * (4 + 8)
    assert not model.head._forward_pre_hooks, "nobody watches behind an experience"


def test_what_it_cannot_serve_is_refused(train, new_model, new_stream) -> None:
    with pytest.raises(InputError, match="continual_backprop with MLPClassifier"):
        train(new_model("moe", residual=True), new_stream(), {"s": ContinualBackprop()})
    for options, key in (({"rate": 2}, "rate"), ({"decay": 1.0}, "decay"), ({"maturity": -1}, "maturity")):
        with pytest.raises(InputError) as caught:
            ContinualBackprop(**options)
        assert caught.value.key == f"strategy.continual_backprop.{key}"


class Moments(Strategy):
    """Looks at what the optimizer remembers of units that were just replaced."""

    def __init__(self, inner: ContinualBackprop) -> None:
        self.inner, self.looked = inner, 0

    def begin(self, outlook: Any) -> None:
        self.optimizer = outlook.forget.__self__.trainer.optimizers[0]

    def batch(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        for name, units in self.inner._units.items():
            for unit in (self.inner.age[name] == 0).nonzero().flatten().tolist() if self.looked else ():
                kept = [self.optimizer.state[rows.weight]["momentum_buffer"][unit] for rows in units.made_by]
                if name != "head":
                    kept.append(self.optimizer.state[units.read_by.weight]["momentum_buffer"][:, unit])
                assert all((value == 0).all() for value in kept)
                self.looked += 1
        self.looked = max(self.looked, 1)
        return inputs, targets


def test_the_optimizer_forgets_what_is_replaced(train, new_stream) -> None:
    with seeded(0, "init"):
        model = MLPClassifier((6,), 6, partial(DenseFFN, hidden=5), width=7)
    strategy = ContinualBackprop(RATE, MATURITY, DECAY)
    watch = Moments(strategy)
    train(model, new_stream(sizes=(64,)), {"s": strategy, "watch": watch}, momentum=0.9)
    assert watch.looked > 3
