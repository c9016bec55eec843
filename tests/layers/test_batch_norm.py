import pytest
import torch

from cl_moe.layers.batch_norm import MaskedBatchNorm


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
