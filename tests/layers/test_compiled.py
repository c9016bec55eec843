"""Compiled layers compute what they compute otherwise, and nothing for what is frozen.

What makes compiling slow is torch's default backend; here the graph is captured, gradients included, and runs
eagerly (``aot_eager``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from cl_moe.layers import PEER, PKM, DenseFFN, MoE, Retrieval, Switch
from tests.layers.product_key_oracle import EVERY, make, name_of, newborns

D = 8
QUICK: dict[str, Callable[[], nn.Module]] = {
    "dense": partial(DenseFFN, D, 4, "gelu", glu=True),
    "moe": partial(MoE, D, 4, 8, partial(Switch, jitter=0)),
    "peer": partial(PEER, D, 16, 2, 4),
    "pkm": partial(PKM, D, 16, 2, 4),
}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def held_against_eager(layer: nn.Module, compiled: Callable, x, mask, cohorts) -> None:
    results = []
    for run in (compiled, layer):
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        out, routing = run(leaf, mask, cohorts)
        (out.square().sum() + sum(routing.losses.values())).backward()
        grads = [p.grad for p in layer.parameters()]
        results.append([out, routing.weight, leaf.grad, *(g for g in grads if g is not None)])
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name == "peer" else []) for name in QUICK]
)
def test_one_of_each_kind_compiles_whole_with_padding_and_for_some_cohorts(name: str):
    layer, count = QUICK[name](), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=count, fullgraph=True)  # a break is an error, as is a warning
    x, mask = torch.randn(2, 5, D), torch.arange(5) < torch.tensor([[5], [3]])
    held_against_eager(layer, compiled, x, mask, None if name == "dense" else [0])
    assert count.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_another_mask_compiles_nothing_and_other_cohorts_something(name: str):
    layer, count = QUICK[name](), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=count, fullgraph=True)
    x, mask = torch.randn(2, 5, D), torch.arange(5) < torch.tensor([[5], [3]])
    if name != "dense":
        layer.grow(9)
        layer.freeze([0])
    for frames, cohorts in enumerate((None, [0], [1]) if name != "dense" else (None,), start=1):
        held_against_eager(layer, compiled, x, mask, cohorts)
        held_against_eager(layer, compiled, 2 * x, mask.flip(1), cohorts)
        assert count.frame_count == frames


@pytest.mark.slow
@pytest.mark.parametrize("name", ["moe", "peer", "pkm"])
def test_a_growth_compiles_once_for_all_cohorts_and_once_for_the_older_ones(name: str):
    layer, count = QUICK[name](), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=count, fullgraph=True)
    x, mask = torch.randn(2, 5, D), torch.arange(5) < torch.tensor([[5], [3]])
    held_against_eager(layer, compiled, x, mask, None)
    for growth in range(1, 4):
        layer.freeze()
        layer.grow(9)
        for _ in range(2):
            held_against_eager(layer, compiled, x, mask, None)
            held_against_eager(layer, compiled, x, mask, list(range(growth)))
        assert count.frame_count == 1 + 2 * growth


def test_a_compiled_dense_layer_may_be_exported():
    layer, x = DenseFFN(D, 4), torch.randn(3, D)
    exported = torch.export.export(layer, (x,)).module()
    assert torch.equal(exported(x)[0], layer(x)[0])
    assert layer(x)[1].expert.shape == (3, 0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["peer", "peer glu", "pkm"])
@pytest.mark.parametrize("retrieval", EVERY, ids=name_of)
def test_every_retrieval_compiles_whole(retrieval: Retrieval, kind: str):
    layer = make(kind, retrieval, dim=6)
    layer.grow(newborns(layer))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x, mask = torch.randn(2, 5, 6), torch.arange(5) < torch.tensor([[5], [3]])
    for cohorts in (None, [0]):
        held_against_eager(layer, compiled, x, mask, cohorts)


class Watch(TorchDispatchMode):
    """Notes what the weights' gradients of our operators look like."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.name() == "cl_moe::grouped_outer":
            self.shapes.append(tuple(out.shape))
        if func.name() == "cl_moe::table_grad":
            self.shapes += [tuple(grad.shape) for grad in out]
        return out


@pytest.mark.parametrize(
    ("made", "learning"),
    [
        (partial(MoE, D, 4, 8), [(3, D, 8), (3, 8, D)]),
        (partial(MoE, D, 4, 8, glu=True, num_noops=2), [(3, D, 8), (3, D, 8), (3, 8, D)]),
        (partial(PEER, D, 16, 2, 4), [(9, D), (9, D)]),
        (partial(PKM, D, 16, 2, 4), [(9, D)]),
    ],
)
def test_a_frozen_cohort_costs_no_weight_gradient(monkeypatch: pytest.MonkeyPatch, made, learning):
    """The computation that is compiled, without a compiler."""
    layer = made()
    layer.freeze()
    layer.grow(9 if isinstance(layer, PEER | PKM) else 3)
    x = torch.randn(20, D, requires_grad=True)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with Watch() as watch:
        layer(x)[0].square().sum().backward()
        assert sorted(watch.shapes) == sorted(learning)
        layer.freeze()
        watch.shapes.clear()
        layer(x)[0].square().sum().backward()
        assert watch.shapes == []
    assert x.grad is not None
