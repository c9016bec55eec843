"""What ``make gpu-check`` does where there is no CUDA device; its checks themselves, on the CPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import gpu_check

sys.path.pop(0)


def test_without_a_device_it_says_that_nothing_was_checked(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main() == 0
    assert "no CUDA device" in capsys.readouterr().out


@pytest.mark.parametrize("name", gpu_check.LAYERS)
def test_a_layer_agrees_with_itself(name):
    assert gpu_check.agrees(gpu_check.LAYERS[name], "cpu")


def test_a_layer_that_computes_something_else_on_the_device_is_named(monkeypatch):
    move, moved = nn.Module.to, []

    def spoiled(self: nn.Module, place: str) -> nn.Module:
        moved.append(place)
        if len(moved) == 2:
            next(self.parameters()).data.add_(1.0)
        return move(self, place)

    monkeypatch.setattr(nn.Module, "to", spoiled)
    assert not gpu_check.agrees(gpu_check.LAYERS["dense"], "cpu")
