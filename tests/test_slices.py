"""Layers of which each rank computes a slice give what whole ones give, outputs and gradients."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from cl_moe import agreement
from cl_moe.engines.slices import Sliced
from cl_moe.layers import DenseFFN, MoE
from cl_moe.models.attention import Mixer
from tests import company


class Body(nn.Module):
    """Attention, a gated layer, experts with a shared one: all with biases that stand behind a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer, self.dense = Mixer(8, num_heads=4), DenseFFN(8, hidden=6, glu=True)
        self.moe = MoE(8, 4, hidden=6, num_shared=1, glu=True)
        self.odd = DenseFFN(8, hidden=5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mixer(x)[0]
        for layer in (self.dense, self.moe, self.odd):
            x = x + layer(x)[0]
        return x


def compute_together() -> None:
    torch.manual_seed(0)
    whole = Body().double()
    for parameter in whole.parameters():
        nn.init.normal_(parameter, std=0.3)
    parted, x = copy.deepcopy(whole), torch.randn(3, 5, 8, dtype=torch.float64)
    sliced = Sliced(parted, agreement.share_layers(2))
    assert len(sliced.cuts) == 17
    assert not any(name.startswith("odd.") for name in sliced.cuts), "five units cannot be halved"
    outs = [model(x) for model in (whole, parted)]
    torch.testing.assert_close(*outs, atol=1e-12, rtol=0)
    for out in outs:
        out.square().sum().backward()
    for (name, one), piece in zip(whole.named_parameters(), parted.parameters(), strict=True):
        assert torch.equal(sliced.whole(name, piece.detach()), one.detach())
        assert (piece.numel() < one.numel()) == (name in sliced.cuts)
        if one.grad is not None:
            grad = sliced.whole(name, piece.grad)
            torch.testing.assert_close(grad, one.grad, atol=1e-11, rtol=0, msg=name)
    assert torch.equal(
        sliced.slices("dense.linear_in.bias", {"m": whole.dense.linear_in.bias})["m"],
        parted.dense.linear_in.bias,
    )


def test_outputs_and_gradients_are_those_of_whole_layers(tmp_path):
    company.among(2, compute_together, folder=tmp_path)
