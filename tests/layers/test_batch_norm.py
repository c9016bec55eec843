import pytest
import torch
from torch.utils.checkpoint import checkpoint

from cl_moe.layers.batch_norm import MaskedBatchNorm
from cl_moe.layers.queries import HeadLayerNorm


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_torch_on_the_real_tokens(dtype):
    torch.manual_seed(0)
    ours, theirs = MaskedBatchNorm(6).to(dtype), torch.nn.BatchNorm1d(6).to(dtype)
    for step in range(3):
        x = (torch.randn(20, 6, dtype=dtype) * 3 + step).requires_grad_()
        valid = torch.rand(20) > 0.3
        a, b = ours(x, valid)[valid], theirs(x[valid])
        torch.testing.assert_close(a, b)
        grads = [torch.autograd.grad(y.sin().sum(), x)[0] for y in (a, b)]
        torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-4)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name))
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_padding_torchs_kernel_computes_what_ours_does(dtype):
    torch.manual_seed(0)
    fast, slow = (MaskedBatchNorm(6).to(dtype) for _ in range(2))
    for step in range(3):
        x = (torch.randn(20, 6, dtype=dtype) * 3 + step).requires_grad_()
        outs = fast(x), slow(x, torch.ones(20, dtype=torch.bool))
        torch.testing.assert_close(*outs)
        grads = [
            torch.autograd.grad(y.sin().sum(), [x, n.weight, n.bias])
            for y, n in zip(outs, (fast, slow), strict=True)
        ]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    for name, value in fast.state_dict().items():
        torch.testing.assert_close(value, slow.state_dict()[name])


def test_several_passes_may_come_before_a_gradient():
    norm, x = MaskedBatchNorm(6), torch.randn(20, 6, requires_grad=True)
    alone = torch.autograd.grad(norm(x).sin().sum(), x)[0]
    first = norm(x)
    norm(torch.randn(9, 6), torch.arange(9) < 5), norm(torch.randn(1, 6)), norm(torch.randn(4, 6))
    torch.testing.assert_close(torch.autograd.grad(first.sin().sum(), x)[0], alone)


def test_fewer_than_two_real_tokens_use_and_leave_the_running_statistics():
    norm = MaskedBatchNorm(4)
    norm(torch.randn(10, 4) * 2 + 1)
    before = norm.running_mean.clone(), norm.running_var.clone()
    x = torch.randn(3, 4)
    out = norm(x, torch.tensor([True, False, False]))
    assert torch.equal(norm.running_mean, before[0])
    assert torch.equal(norm.running_var, before[1])
    torch.testing.assert_close(out, norm.eval()(x))


def test_frozen_statistics_rule_in_training_too():
    norm = MaskedBatchNorm(4)
    norm(torch.randn(10, 4))
    norm.freeze_statistics()
    before = norm.running_mean.clone()
    x = torch.randn(10, 4) + 5
    out = norm.train()(x)
    assert torch.equal(norm.running_mean, before)
    assert torch.equal(out, norm.eval()(x))


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_is_computed_again_for_gradients_counts_once(reentrant):
    once, again = MaskedBatchNorm(4), MaskedBatchNorm(4)
    x = torch.randn(10, 4, requires_grad=True)
    for _ in range(2):
        once(x).sin().sum().backward()
        checkpoint(again, x, use_reentrant=reentrant).sin().sum().backward()
    for name, value in once.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert torch.equal(once.weight.grad, again.weight.grad)


def test_query_layer_norm_is_that_of_torch_for_every_head():
    norm, theirs = HeadLayerNorm(3, 4), torch.nn.LayerNorm(4)
    x = torch.randn(5, 12)
    expected = theirs(x.reshape(5, 3, 4)).reshape(5, 12)
    torch.testing.assert_close(norm(x), expected)
    with torch.no_grad():
        norm.weight.copy_(torch.arange(12.0))
        norm.bias.fill_(2.0)
    torch.testing.assert_close(norm(x), expected * torch.arange(12.0) + 2)
