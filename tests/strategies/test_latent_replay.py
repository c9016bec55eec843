"""Latent replay: what is kept, the loss over both kinds of rows, and what stands still below the cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from cl_moe.errors import InputError
from cl_moe.strategies import LatentReplay, Step, Strategy
from cl_moe.strategies.latent_replay import below


class Watch(Strategy):
    """The term by hand: the upper part of the network, written out, on the rows that are drawn."""

    def __init__(self, inner: LatentReplay) -> None:
        self.inner, self.checked = inner, 0

    def begin(self, outlook: Any) -> None:
        self.inner.begin(outlook)

    def loss(self, step: Step) -> dict[str, Tensor]:
        draw = torch.Generator()
        draw.set_state(self.inner._draw.get_state())
        terms = self.inner.loss(step)
        if terms:
            count = int(len(step.targets) * 0.25 / 0.75 + 1e-9)  # nothing is owed at the start
            if self.inner._owed < 1 and self.checked == 0:
                rows = torch.randint(len(self.inner.memory), (count,), generator=draw)
                kept, targets = (column[rows] for column in self.inner.memory.columns)
                if self.inner.cut == 0:
                    kept = torch.relu(step.model.blocks[0](torch.relu(kept))[0])
                old = F.cross_entropy(step.model.head(kept), targets)
                whole = (len(step.targets) * step.task_loss + count * old) / (len(step.targets) + count)
                torch.testing.assert_close(step.task_loss + terms["latent_replay"], whole)
                self.checked += 1
        return terms

    def gradients(self, model: Any) -> None:
        self.inner.gradients(model)

    def batch(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner.batch(inputs, targets)

    def end(self, outlook: Any) -> None:
        self.inner.end(outlook)


@pytest.mark.parametrize("cut", [0, 1])
@pytest.mark.parametrize("layer", ["dense", "peer"])
def test_the_upper_part_learns_from_both(walk, new_model, new_stream, layer: str, cut: int) -> None:
    watch = Watch(LatentReplay(memory_size=9, cut=cut, share=0.25))
    before: dict[str, Tensor] = {}
    for moment, learner in walk(new_model(layer), new_stream(), {"s": watch}, momentum=0.9):
        state = learner.model.state_dict()
        if moment == "adapted":
            before = {name: value.clone() for name, value in state.items()}
            continue
        moved = {name for name, value in state.items() if not torch.equal(value, before[name])}
        lower = {n for n in state if n.startswith("stem.") or (cut and n.startswith("blocks."))}
        assert bool(moved & lower) == (learner.experience.index == 0)
        assert moved - lower
        model, inputs = learner.model, learner.experience.train.tensors[0]
        stem = model.stem(inputs)
        model.eval()
        latent = stem if cut == 0 else torch.relu(model.blocks[0](torch.relu(stem))[0])
        model.train()
        kept = watch.inner.memory.columns[0]
        nearest = (kept[:, None] - latent[None].detach()).abs().amax(2).amin(1)
        assert (nearest < 1e-5).any(), "some of this experience"
    assert watch.checked == 1
    assert watch.inner.buffer_bytes == 9 * (16 * 4 + 8)


def test_a_slowed_part_moves_by_a_share(new_model, new_stream, outlook) -> None:
    seen = outlook(new_stream()[1])
    seen.model.head.grow([0, 1])
    strategy = LatentReplay(lower_rate=0.25)
    strategy.begin(seen)
    for parameter in seen.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    strategy.gradients(seen.model)
    slowed = {name for name, p in seen.model.named_parameters() if (p.grad == 0.25).all()}
    assert slowed == {"stem.weight", "stem.bias"}


def test_below_and_above_a_cut(new_model) -> None:
    model = new_model("peer")
    model.head.grow([0, 1])
    names, norms = below(model, model.cuts[0], torch.randn(1, 6))
    assert (names, norms) == ({"stem.weight", "stem.bias"}, [])
    names, norms = below(model, model.cuts[1], torch.randn(1, 6))
    assert names == {n for n, _ in model.named_parameters() if not n.startswith("head.")}
    assert len(norms) == 1


def test_what_it_cannot_serve_is_refused(train, new_model, new_stream) -> None:
    with pytest.raises(InputError, match=r"cut=2 of MLPClassifier, which has 2"):
        train(new_model(), new_stream(), {"s": LatentReplay(cut=2)})
    for options, key in (({"share": 1.0}, "share"), ({"lower_rate": 2.0}, "lower_rate")):
        with pytest.raises(InputError) as caught:
            LatentReplay(**options)
        assert caught.value.key == f"strategy.latent_replay.{key}"
