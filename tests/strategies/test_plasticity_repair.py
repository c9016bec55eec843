"""Shrink and perturb, and re-warming: what weights and rates become, by the formula, once per experience."""

from __future__ import annotations

import math

import pytest
import torch

from cl_moe.errors import InputError
from cl_moe.growth import AllPast, PastExperts
from cl_moe.seeds import generator
from cl_moe.strategies import Naive, Rewarming, ShrinkPerturb, Strategy


class Watch(Strategy):
    """Weights before and after the first batch of each experience, and the rate of every step."""

    def __init__(self, inner: Strategy) -> None:
        self.inner, self.changes, self.model = inner, [], None

    def begin(self, outlook) -> None:
        self.inner.begin(outlook)
        self.model = outlook.model
        self.first = True

    def batch(self, inputs, targets):
        before = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        out = self.inner.batch(inputs, targets)
        if self.first:
            self.changes.append((before, {n: p.detach().clone() for n, p in self.model.named_parameters()}))
        else:
            assert all(torch.equal(p, before[n]) for n, p in self.model.named_parameters()), "once only"
        self.first = False
        return out

    def end(self, outlook) -> None:
        self.inner.end(outlook)


def test_weights_shrink_and_are_shaken_once(train, new_model, new_stream, growing) -> None:
    watch = Watch(ShrinkPerturb(shrink=0.3, noise=0.02))
    train(new_model("moe"), new_stream(), {"s": watch}, growing["moe"], PastExperts())
    (a, b), *later = watch.changes
    assert all(torch.equal(a[name], b[name]) for name in a), "nothing to repair at first"
    for index, (before, after) in enumerate(later, start=1):
        for name, old in before.items():
            newborn = name.startswith((f"head.cohorts.{index}.", f"blocks.0.cohorts.{index}."))
            frozen = name.startswith("blocks.0.cohorts.") and not newborn
            if newborn or frozen:
                assert torch.equal(after[name], old), name
            else:
                draw = generator(0, index, "shrink_perturb", name)
                expected = 0.3 * old + 0.02 * torch.randn(old.shape, generator=draw)
                torch.testing.assert_close(after[name], expected)


def test_what_cannot_be_shrunk_is_refused() -> None:
    for options, key in (({"shrink": 0.0}, "shrink"), ({"shrink": 1.5}, "shrink"), ({"noise": -1}, "noise")):
        with pytest.raises(InputError) as caught:
            ShrinkPerturb(**options)
        assert caught.value.key == f"strategy.shrink_perturb.{key}"


def test_the_rate_of_every_step(walk, new_model, new_stream, monkeypatch) -> None:
    """24, 16 and 20 examples in batches of 8, twice: 6, 4 and 6 steps."""
    rates: list[list[float]] = []
    original = torch.optim.SGD.step

    def step(self, *args, **options):
        out = original(self, *args, **options)  # the closure is inside
        rates[-1].append(self.param_groups[0]["lr"])
        return out

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    strategies = {"s": Rewarming(warmup=0.5, peak=0.6, floor=0.2), "naive": Naive()}
    for moment, _ in walk(new_model(), new_stream(), strategies, lr=0.1):
        if moment == "adapted":
            rates.append([])
    assert [len(part) for part in rates] == [6, 4, 6]
    for index, part in enumerate(rates):
        peak, total = (0.6 if index else 1.0), len(part)
        for t, rate in enumerate(part, start=1):
            fall = (1 + math.cos(math.pi * (t - total / 2) / (total / 2))) / 2
            factor = peak * t / (total / 2) if t <= total / 2 else 0.2 + (peak - 0.2) * fall
            assert rate == pytest.approx(0.1 * factor)


def test_rates_that_cannot_be_are_refused() -> None:
    for options, key in (({"warmup": 1}, "warmup"), ({"peak": 0}, "peak"), ({"floor": 2.0}, "floor")):
        with pytest.raises(InputError) as caught:
            Rewarming(**options)
        assert caught.value.key == f"strategy.rewarming.{key}"


def test_nothing_frozen_is_touched(train, new_model, new_stream) -> None:
    watch = Watch(ShrinkPerturb())
    train(new_model(), new_stream(), {"s": watch}, policy=AllPast())
    for before, after in watch.changes[1:]:
        assert all(torch.equal(before[name], after[name]) for name in before)
