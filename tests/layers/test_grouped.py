"""Grouped products against a loop over experts: values, gradients, several optimizer steps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cl_moe.layers import MoE, TopK, grouped
from cl_moe.layers.grouped import grouped_linear, grouped_relu_ffn, opaque_grouped_mm
from cl_moe.layers.reuse import Reused

COUNTS = ([3, 0, 5], [0, 0, 8], [0, 0, 0], [1, 1, 1])


def starts(counts: list[int]) -> Tensor:
    return torch.tensor([0, *counts]).cumsum(0)


def looped(x, weights, biases, start) -> Tensor:
    """Row by row; ``weights`` one matrix per expert, of any widths."""
    width = max(w.shape[1] for w in weights)
    rows = []
    for e, (w, b) in enumerate(zip(weights, biases, strict=True)):
        for row in x[start[e] : start[e + 1]]:
            out = row[: w.shape[0]] @ w + (0 if b is None else b)
            rows.append(torch.nn.functional.pad(out, (0, width - w.shape[1])))
    return torch.stack(rows) if rows else x.new_zeros(0, width) + 0 * x.sum()


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("num_in", [8, 5])  # 5: rows that are no whole 16 bytes
def test_a_linear_map_of_groups_equals_a_loop_over_rows(counts, dtype, bias, num_in):
    torch.manual_seed(0)
    start = starts(counts)
    x = torch.randn(sum(counts), num_in, dtype=dtype, requires_grad=True)
    w = torch.randn(3, num_in, 4, dtype=dtype, requires_grad=True)
    b = torch.randn(3, 4, dtype=dtype, requires_grad=True) if bias else None
    learns = [x, w, *([b] if bias else [])]
    out = grouped_linear(x, w, b, start)
    expected = looped(x, w, b if bias else [None] * 3, start)
    torch.testing.assert_close(out, expected)
    grads = torch.autograd.grad(out.square().sum(), learns)
    oracle = torch.autograd.grad(expected.square().sum(), learns, allow_unused=True)
    for a, o in zip(grads, oracle, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if o is None else o)


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("learns", ["all", "x", "w_in", "b_in", "w_out", "b_out"])
def test_two_maps_and_a_relu_as_one_operation_have_the_bits_of_two(counts, bias, learns):
    torch.manual_seed(0)
    start = starts(counts)
    made = {"x": (sum(counts), 8), "w_in": (3, 8, 12), "b_in": (3, 12), "w_out": (3, 12, 4), "b_out": (3, 4)}
    named = {n: None if n[0] == "b" and not bias else torch.randn(size) for n, size in made.items()}
    learning = [named[n] for n in made if named[n] is not None and learns in ("all", n)]
    for tensor in learning:
        tensor.requires_grad_()
    x, w_in, b_in, w_out, b_out = named.values()
    one = grouped_relu_ffn(x, w_in, b_in, w_out, b_out, start, (Reused(), Reused()))
    two = grouped_linear(torch.relu(grouped_linear(x, w_in, b_in, start)), w_out, b_out, start)
    assert torch.equal(one, two)
    kept = {k.data_ptr() for k in getattr(one.grad_fn, "saved_tensors", ()) if k is not None and k.numel()}
    weight = torch.randn_like(one)
    if learning:
        grads = [torch.autograd.grad((out * weight).sum(), learning) for out in (one, two)]
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert (x.data_ptr() in kept) == (learns in ("all", "w_in") and len(x) > 0)
    assert (w_in.data_ptr() in kept) == (learns in ("all", "x"))
    assert (w_out.data_ptr() in kept) == (learns in ("all", "x", "w_in") or (bias and learns == "b_in"))


@pytest.mark.parametrize("learns", ["x", "w", "b"])
def test_what_does_not_learn_costs_nothing_and_keeps_nothing(learns):
    named = {"x": torch.randn(4, 8), "w": torch.randn(2, 8, 4), "b": torch.randn(2, 4)}
    named[learns].requires_grad_()
    out = grouped_linear(named["x"], named["w"], named["b"], starts([3, 1]))
    kept = {kept.data_ptr() for kept in out.grad_fn.saved_tensors if kept is not None}
    assert (named["x"].data_ptr() in kept) == (learns == "w")
    assert (named["w"].data_ptr() in kept) == (learns == "x")
    out.sum().backward()
    assert [name for name, tensor in named.items() if tensor.grad is not None] == [learns]


@pytest.mark.parametrize("behind", [0, 2])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("widths", [(8, 8), (4, 12)])
def test_cohorts_as_one_operator_equal_a_loop_over_rows(widths, counts, behind):
    """Two experts of one cohort and one of another; rows behind the last group are 0."""
    torch.manual_seed(0)
    start, widest = starts(counts), max(widths)
    for shape in ("in", "out"):
        sizes = [(8, width) if shape == "in" else (width, 4) for width in widths]
        cohorts = [torch.randn(n, *size, requires_grad=True) for n, size in zip((2, 1), sizes, strict=True)]
        x = torch.randn(sum(counts) + behind, 8 if shape == "in" else widest, requires_grad=True)
        out = opaque_grouped_mm(x, cohorts, start, behind == 0)
        expected = looped(x, [*cohorts[0], *cohorts[1]], [None] * 3, start)
        expected = torch.nn.functional.pad(expected, (0, 0, 0, behind))
        torch.testing.assert_close(out, expected)
        grads = torch.autograd.grad(out.square().sum(), [x, *cohorts])
        oracle = torch.autograd.grad(expected.square().sum(), [x, *cohorts], allow_unused=True)
        for a, o in zip(grads, oracle, strict=True):
            torch.testing.assert_close(a, torch.zeros_like(a) if o is None else o)


def test_several_optimizer_steps_equal_those_of_the_loop(monkeypatch: pytest.MonkeyPatch):
    x, target, trained = torch.randn(5, 30, 16), torch.randn(30, 16), []
    for stock in (True, False):
        torch.manual_seed(0)
        layer = MoE(16, 6, 8, TopK(16, 2))
        layer.freeze()
        layer.grow(4)
        if not stock:
            monkeypatch.setattr(grouped, "_stock_serves", lambda w: False)
        born = layer.cohorts[1].w_in.detach().clone()
        optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=0.02)
        for batch in x:
            optimizer.zero_grad()
            out, routing = layer(batch)
            ((out - target).square().mean() + sum(routing.losses.values())).backward()
            optimizer.step()
        trained.append({name: value.detach().clone() for name, value in layer.named_parameters()})
    assert not torch.isclose(trained[0]["cohorts.1.w_in"], born).any()
    torch.testing.assert_close(*trained, atol=1e-5, rtol=1e-4)
