"""Mixture-of-Depths against a loop over sequences, and what may pass through it.

Legend: B sequences, S positions, D width.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cl_moe.errors import InputError
from cl_moe.layers import DepthRouter, MixtureOfDepths, MoE, TopK, fold_load

D = 6


class Mean(nn.Module):
    """A residual block in which every token hears of all others before it, or of all."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.linear = nn.Linear(D, D)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        real = torch.ones(x.shape[:2], dtype=x.dtype) if mask is None else mask.to(x.dtype)
        heard = real.unsqueeze(1).expand(-1, x.shape[1], -1)
        heard = heard.tril() if self.causal else heard
        mean = heard @ x / heard.sum(dim=-1, keepdim=True).clamp_min(1)
        return x + torch.tanh(self.linear(mean))


class Staged(nn.Module):
    """A residual block that is a mixture of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = MoE(D, 4, 8, TopK(D, k=2))

    def forward(self, x, mask=None, cohorts=None):
        out, routing = self.experts(x, mask, cohorts)
        return x + out, routing


def built(causal: bool = True, dtype: torch.dtype = torch.float32, **options) -> MixtureOfDepths:
    torch.manual_seed(0)
    return MixtureOfDepths(Mean(causal), D, causal=causal, **options).to(dtype)


def naive(model: MixtureOfDepths, x_BSD: Tensor, mask: Tensor | None, by_predictor: bool) -> Tensor:
    """One sequence after the other, one token after the other."""
    outs = []
    for b, x_SD in enumerate(x_BSD):
        real = [s for s in range(len(x_SD)) if mask is None or mask[b, s]]
        r = {s: (model.depth.score.weight[0] * x_SD[s]).sum() for s in real}
        if by_predictor:
            chosen = [s for s in real if model.depth.predictor(x_SD[s]).item() > 0]
        else:
            count = math.ceil(round(len(real) * model.depth.capacity, 9))
            chosen = sorted(sorted(real, key=lambda s: (-r[s].item(), s))[:count])
        rows = list(x_SD)
        if chosen:
            inside = torch.stack([x_SD[s] for s in chosen])
            change = model.block(inside.unsqueeze(0))[0] - inside
            for place, s in enumerate(chosen):
                rows[s] = x_SD[s] + r[s] * change[place]
        outs.append(torch.stack(rows))
    return torch.stack(outs)


@settings(max_examples=40)
@given(
    st.integers(1, 3),
    st.integers(1, 9),
    st.sampled_from([0.125, 0.3, 0.5, 1.0]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_it_equals_a_loop_over_tokens(batch, length, capacity, causal, training, padded, dtype):
    model = built(causal, dtype, capacity=capacity).train(training)
    x = torch.randn(batch, length, D, dtype=dtype, generator=torch.Generator().manual_seed(length))
    mask = torch.rand(batch, length, generator=torch.Generator().manual_seed(1)) < 0.7 if padded else None
    outs, gradients = [], []
    for run in (lambda x: model(x, mask)[0], lambda x: naive(model, x, mask, causal and not training)):
        leaf = x.clone().requires_grad_()
        model.zero_grad()
        out = run(leaf)
        (out * torch.linspace(-1, 1, out.numel(), dtype=dtype).view_as(out)).sum().backward()
        outs.append(out)
        learning = [model.block.linear.weight, model.block.linear.bias, model.depth.score.weight]
        gradients.append([leaf.grad, *(torch.zeros_like(p) if p.grad is None else p.grad for p in learning)])
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-11}
    torch.testing.assert_close(*outs, **tolerance)
    for fast, slow in zip(*gradients, strict=True):
        torch.testing.assert_close(fast, slow, **tolerance)


@pytest.mark.parametrize("causal", [True, False])
def test_at_capacity_1_with_r_1_it_is_the_plain_block(causal: bool):
    model = built(causal, torch.float64, capacity=1.0)
    x = torch.randn(2, 7, D, dtype=torch.float64)
    x[..., 0] = 1.0
    with torch.no_grad():
        model.depth.score.weight.copy_(torch.eye(D)[:1])  # r is the first feature, which is 1
    torch.testing.assert_close(model(x)[0], model.block(x), rtol=0, atol=1e-14)


@pytest.mark.parametrize("training", [True, False])
def test_the_record_says_who_went_through(training: bool):
    model, x = built(False, capacity=0.5).train(training), torch.randn(3, 8, D)
    mask = torch.arange(8) < torch.tensor([[8], [5], [0]])
    out, routing = model(x, mask)
    kept = routing.kept.view(3, 8)
    assert kept.sum(dim=1).tolist() == [4, 3, 0], "half of the real tokens, rounded up"
    assert not (kept & ~mask).any()
    changed = (out != x).any(dim=-1)
    assert torch.equal(changed, kept)
    load = fold_load(routing)
    assert (load.count.tolist(), load.kept.item()) == ([13], 7)


def test_ties_go_to_the_earliest():
    model = built(False, capacity=0.5)
    nn.init.zeros_(model.depth.score.weight)
    kept = model(torch.randn(2, 6, D))[1].kept.view(2, 6)
    assert kept.tolist() == [[True, True, True, False, False, False]] * 2


def test_what_stands_on_padding_reaches_nothing():
    model, x = built(True, capacity=0.5), torch.randn(2, 8, D)
    mask = torch.arange(8) < torch.tensor([[8], [3]])
    other = torch.where(mask.unsqueeze(-1), x, torch.full_like(x, 50.0))
    (out, routing), (again, second) = model(x, mask), model(other, mask)
    assert torch.equal(out[mask], again[mask])
    assert torch.equal(routing.losses["depth_predictor"], second.losses["depth_predictor"])


def test_in_evaluation_a_causal_one_does_not_look_ahead_and_in_training_it_does():
    model, x = built(True, torch.float64, capacity=0.25), torch.randn(4, 8, D, dtype=torch.float64)
    changed = x.clone()
    changed[:, 5:] *= -3
    with torch.no_grad():
        before, after = model.eval()(x), model(changed)
        torch.testing.assert_close(before[0][:, :5], after[0][:, :5], rtol=0, atol=1e-12)
        assert torch.equal(*(r.kept.view(4, 8)[:, :5] for _, r in (before, after)))
        assert 0 < before[1].kept.sum() < 32, "the test would see nothing else"
        model.train()
        assert not torch.equal(*(model(data)[1].kept.view(4, 8)[:, :5] for data in (x, changed)))


def test_the_predictor_learns_who_is_chosen_and_teaches_nobody_else():
    model, x = built(True, capacity=0.25), torch.randn(16, 16, D)
    optimizer = torch.optim.Adam(model.depth.predictor.parameters(), lr=0.02)
    leaf = x.clone().requires_grad_()
    model(leaf)[1].losses["depth_predictor"].backward()
    assert leaf.grad is None
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        f"depth.predictor.{at}.{part}" for at in (0, 2) for part in ("weight", "bias")
    }
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        losses.append(model(x)[1].losses["depth_predictor"])
        losses[-1].backward()
        optimizer.step()
    chosen = model(x)[1].kept
    agreed = (model.eval()(x)[1].kept == chosen).float().mean()
    assert losses[-1] < 0.5 * losses[0]
    assert agreed > 0.85 > (~chosen).float().mean(), "better than to say no to everything"


def test_a_mixture_of_experts_inside_is_told_of_chosen_tokens_only():
    torch.manual_seed(0)
    model, x = MixtureOfDepths(Staged(), D, 0.5, causal=False), torch.randn(2, 8, D)
    mask = torch.arange(8) < torch.tensor([[8], [5]])
    out, routing, inner = model.trace(x, mask)
    token, expert, _, _ = inner[0].pairs()
    went = routing.kept.view(-1).nonzero().squeeze(1)
    assert torch.equal(token.unique(), went)
    assert fold_load(inner[0]).count.sum() == 2 * len(went)
    direct = model.block.experts(x.view(-1, D)[went])[1]
    assert torch.equal(expert.view(-1, 2), direct.expert)
    assert torch.equal(inner[0].scores[went], direct.scores)
    assert inner[0].scores[~routing.kept.view(-1)].eq(float("-inf")).all()
    merged = model(x, mask)[1].losses
    assert torch.equal(merged["balance"], inner[0].losses["balance"])
    model.block.experts.grow(3)
    assert (model.trace(x, mask, cohorts=[0])[0] - out).abs().max() < 1e-6
    assert (model.trace(x, mask)[2][0].expert >= 4).any()


def test_nobody_goes_through_and_nothing_breaks():
    model = built(True).eval()
    nn.init.constant_(model.depth.predictor[2].bias, -100.0)
    x = torch.randn(2, 5, D)
    out, routing = model(x)
    assert torch.equal(out, x)
    assert not routing.kept.any()


def test_a_block_without_a_mask_serves_causal_ones():
    class Plain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    mask = torch.arange(4) < torch.tensor([[4], [2]])
    assert MixtureOfDepths(Plain(), D)(torch.randn(2, 4, D), mask)[0].shape == (2, 4, D)
    with pytest.raises(InputError, match="Plain"):
        MixtureOfDepths(Plain(), D, causal=False)(torch.randn(2, 4, D), mask)


def test_under_autocast_it_chooses_in_float32():
    model, x = built(False, capacity=0.5), torch.randn(2, 8, D)
    plain = model(x)[1]
    with torch.autocast("cpu", torch.bfloat16):
        out, routing = model(x)
    assert torch.equal(routing.scores, plain.scores)
    assert (out.dtype, routing.scores.dtype) == (torch.float32, torch.float32)


def test_bad_input_is_refused():
    for options, key in (
        ({"capacity": 0.0}, "capacity"),
        ({"capacity": 1.5}, "capacity"),
        ({"capacity": float("nan")}, "capacity"),
        ({"predictor_weight": -1.0}, "predictor_weight"),
    ):
        with pytest.raises(InputError) as caught:
            DepthRouter(D, **options)
        assert caught.value.key == f"model.depth.{key}"
    model = built()
    for x in (torch.randn(2, 3, D + 1), torch.zeros(2, 3, D, dtype=torch.int64), torch.randn(D)):
        with pytest.raises(InputError, match="floating"):
            model(x)
    with pytest.raises(InputError, match="mask"):
        model(torch.randn(2, 3, D), torch.ones(2, 3))
