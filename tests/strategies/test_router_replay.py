"""Router-only replay: its gradient by hand, and on the router alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from cl_moe.errors import InputError
from cl_moe.layers.router_parts import router_names
from cl_moe.strategies import RouterFreezing, RouterReplay, Strategy


class Watch(Strategy):
    """Gradients before and after, and the examples that were drawn."""

    def __init__(self, inner: RouterReplay) -> None:
        self.inner, self.steps = inner, list[dict[str, Any]]()

    def begin(self, outlook: Any) -> None:
        self.inner.begin(outlook)

    def gradients(self, model: Any) -> None:
        live = dict(model.named_parameters())
        before = {n: p.grad.clone() for n, p in live.items() if p.grad is not None}
        draw, kept = torch.Generator(), self.inner.memory.columns
        draw.set_state(self.inner._draw.get_state())
        expected: dict[str, torch.Tensor] = {}
        if kept:
            rows = torch.randperm(len(kept[0]), generator=draw)[:4]
            model.eval()
            logits, _ = model(kept[0][rows])
            model.train()
            loss = F.cross_entropy(logits, kept[1][rows])
            names = [n for n in router_names(model) if n in live]
            found = torch.autograd.grad(loss, [live[n] for n in names], allow_unused=True)
            expected = {n: g for n, g in zip(names, found, strict=True) if g is not None}
        self.inner.gradients(model)
        after = {n: p.grad.clone() for n, p in live.items() if p.grad is not None}
        self.steps.append({"before": before, "after": after, "expected": expected})

    def end(self, outlook: Any) -> None:
        self.inner.end(outlook)


@pytest.mark.parametrize("layer", ["moe", "peer"])
def test_the_router_alone_hears_of_the_past(train, new_model, new_stream, growing, layer: str) -> None:
    watch = Watch(RouterReplay(memory_size=10, sample_size=4, strength=0.5))
    train(new_model(layer), new_stream(), {"s": watch}, growing[layer], epochs=1)
    assert [bool(step["expected"]) for step in watch.steps[:4]] == [False, False, False, True]
    for step in watch.steps:
        for name, gradient in step["after"].items():
            added = 0.5 * step["expected"].get(name, torch.zeros(()))
            torch.testing.assert_close(gradient, step["before"].get(name, 0 * added) + added)
    moved = sum(float(g.abs().sum()) for step in watch.steps for g in step["expected"].values())
    assert moved > 0
    assert watch.inner.buffer_bytes == 10 * (6 * 4 + 8)


def test_what_it_cannot_serve_is_refused(train, new_model, new_stream) -> None:
    with pytest.raises(InputError, match="routes nothing"):
        train(new_model("dense"), new_stream(), {"s": RouterReplay()})
    both = {"s": RouterReplay(), "router_freezing": RouterFreezing()}
    with pytest.raises(InputError, match="beside router_freezing"):
        train(new_model("moe"), new_stream(), both)
    with pytest.raises(InputError, match=r"strategy\.router_replay\.sample_size"):
        RouterReplay(sample_size=0)
