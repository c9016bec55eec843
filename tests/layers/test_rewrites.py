"""Layers under what rewrites their execution: torch.compile and activation checkpointing."""

from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from cl_moe.layers import (
    Capacity,
    ExpertChoice,
    GShard,
    MixtureOfDepths,
    MoE,
    Scores,
    Switch,
    TopK,
    fold_load,
)

ROUTERS = {
    "switch": partial(Switch, jitter=0, capacity_factor=0.8, min_capacity=1),
    "top_k": partial(TopK, z_loss=0.1),
    "top_k_loss_free": partial(TopK, scores=Scores("sigmoid", 1e-3)),
    "gshard": partial(GShard, second="all", capacity=Capacity(1.0, 1.0, 1)),
    "expert_choice": ExpertChoice,
}


class Block(torch.nn.Module):
    """A residual block that is a mixture of experts, two of which do nothing."""

    def __init__(self):
        super().__init__()
        self.experts = MoE(8, 4, 8, partial(TopK, z_loss=0.1), num_noops=2)

    def forward(self, x, mask=None, cohorts=None):
        out, routing = self.experts(x, mask, cohorts)
        return x + out, routing


def gradients(layer, x, out, routing):
    loss = out.square().sum() + sum(routing.losses.values())
    tensors = [x, *(p for p in layer.parameters() if p.requires_grad)]
    return torch.autograd.grad(loss, tensors, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("num_noops", [0, 2])
def test_checkpointing_changes_no_count_and_no_gradient(name, num_noops):
    torch.manual_seed(0)
    layer = MoE(8, 4, 8, ROUTERS[name], num_shared=1, dropout=0.3, num_noops=num_noops)
    layer.grow(2)
    x = torch.randn(3, 6, 8, requires_grad=True)
    results = []
    for run in (layer, partial(checkpoint, layer, use_reentrant=False)):
        torch.manual_seed(1)
        out, routing = run(x)
        results.append((out, *fold_load(routing), *gradients(layer, x, out, routing)))
        if layer.wants_load:
            assert all((c.selection_bias == 0).all() for c in layer.cohorts)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_checkpointing_a_block_at_depth_changes_no_count_and_no_gradient(masked, training):
    torch.manual_seed(0)
    model = MixtureOfDepths(Block(), 8, 0.4).train(training)
    x, mask = torch.randn(3, 7, 8, requires_grad=True), torch.rand(3, 7) > 0.3 if masked else None
    results = []
    for run in (model.trace, partial(checkpoint, model.trace, use_reentrant=False)):
        out, routing, inner = run(x, mask)
        loads = (*fold_load(routing), *fold_load(inner[0]))
        losses = {**routing.losses, **inner[0].losses}
        results.append((out, *loads, *gradients(model, x, out, routing._replace(losses=losses))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_a_block_at_depth_compiles_whole_and_once_more_for_a_growth(masked, causal):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = MixtureOfDepths(Block(), 8, 0.4, causal=causal)
    count = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model.trace, backend=count, fullgraph=True)
    mask = torch.rand(3, 7) > 0.3 if masked else None
    for growths in range(3):
        for _ in range(2):
            x = torch.randn(3, 7, 8, requires_grad=True)
            results, loads = [], []
            for run in (compiled, model.trace):
                out, routing, inner = run(x, mask)
                losses = {**routing.losses, **inner[0].losses}
                results.append((out, *gradients(model, x, out, routing._replace(losses=losses))))
                loads.append((*fold_load(routing), *fold_load(inner[0])))
            torch.testing.assert_close(*results, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(*loads)
        assert count.frame_count == 1 + growths
        model.block.experts.freeze()
        model.block.experts.grow(3)
    compiled = torch.compile(model.eval(), backend="aot_eager", fullgraph=not causal)  # its predictor breaks
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, mask)[0], model(x, mask)[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "masked", "options"),
    [
        *((name, True, {}) for name in ROUTERS),
        ("top_k", False, {}),
        ("expert_choice", False, {}),
        *((name, True, {"num_noops": 2, "glu": True, "activation": "silu"}) for name in ROUTERS),
    ],
)
def test_compiled_without_breaks_and_once_more_for_a_growth(name, masked, options):
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer = MoE(8, 4, 8, ROUTERS[name], num_shared=1, **options)
    count = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=count, fullgraph=True)  # a break is an error
    mask = torch.rand(3, 6) > 0.3 if masked else None
    for growths in range(3):
        for _ in range(2):
            x = torch.randn(3, 6, 8, requires_grad=True)
            out, routing = compiled(x, mask)
            expected, eager = layer(x, mask)
            torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)
            assert torch.equal(routing.expert, eager.expert)
            assert torch.equal(routing.kept, eager.kept)
            ours, theirs = gradients(layer, x, out, routing), gradients(layer, x, expected, eager)
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
            if layer.wants_load:
                layer.after_step(fold_load(routing).count)  # moves a bias, compiles nothing
        assert count.frame_count == 1 + growths
        layer.freeze()
        layer.grow(3, hidden=12 if growths else None)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, when its backend loads
@pytest.mark.parametrize("options", [{}, {"num_noops": 2, "glu": True, "activation": "gelu_tanh"}])
def test_compiled_by_the_default_backend(options):
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer = MoE(8, 4, 8, **options)
    layer.grow(2, hidden=5)  # rows that F.grouped_mm refuses, padded
    x = torch.randn(3, 6, 8, requires_grad=True)
    out, routing = torch.compile(layer, fullgraph=True)(x)
    expected, eager = layer(x)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)
    for a, b in zip(gradients(layer, x, out, routing), gradients(layer, x, expected, eager), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("options", [{"bias": False}, {"num_noops": 2}, {"num_noops": 1, "glu": True}])
def test_the_static_computation_equals_the_eager_one_for_a_subset(monkeypatch, options):
    """The same path without a compiler: cohorts asked for, bfloat16 by autocast, float64, no biases."""
    torch.manual_seed(0)
    layer = MoE(8, 3, 8, partial(Switch, jitter=0, capacity_factor=0.5, min_capacity=1), **options)
    layer.grow(2, hidden=4)
    layer.grow(4)
    x = torch.randn(4, 9, 8)
    for dtype, autocast in ((torch.float32, False), (torch.float32, True), (torch.float64, False)):
        layer.to(dtype)
        outs, grads = [], []
        for compiling in (False, True):
            with monkeypatch.context() as patch, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                patch.setattr(torch.compiler, "is_compiling", lambda on=compiling: on)
                leaf = x.to(dtype, copy=True).requires_grad_()
                out, routing = layer(leaf, cohorts=[0, 2])
                outs.append(out)
                grads.append(gradients(layer, leaf, out, routing))
        close = {"atol": 1e-2, "rtol": 1e-2} if autocast else {"atol": 1e-6, "rtol": 1e-5}
        torch.testing.assert_close(*outs, **close)
        if not autocast:
            torch.testing.assert_close(*grads, **close)
        assert (outs[0] == 0).all(dim=-1).any(), "some were dropped"
