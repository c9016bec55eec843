"""Three kills in every test run; the twenty of ``make chaos`` among the slow ones."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

CHAOS = runpy.run_path(str(Path(__file__).with_name("chaos.py")))


@pytest.mark.parametrize(("seed", "kills"), [(0, 3), pytest.param(1, 20, marks=pytest.mark.slow)])
def test_killed_at_random_moments_the_run_ends_the_same(seed: int, kills: int, ready_store, tmp_path):
    said = CHAOS["play"](tmp_path, seed, kills, ready_store)
    assert len(said) == kills
    assert sum("status -9" in line or "status 75" in line for line in said) > kills / 2


@pytest.mark.parametrize("change", ["file", "weight", "point"])
def test_a_difference_is_found(change: str):
    import torch

    one = {"files": {"a": b"1"}, "state": {"w": [torch.zeros(2)]}, "points": {"k": [(0, 1.0)]}}
    two = {"files": {"a": b"1"}, "state": {"w": [torch.zeros(2)]}, "points": {"k": [(0, 1.0)]}}
    assert CHAOS["differences"](one, two) == []
    if change == "file":
        two["files"]["a"] = b"2"
    elif change == "weight":
        two["state"]["w"][0][1] = 1e-45
    else:
        two["points"]["k"] *= 2
    assert len(CHAOS["differences"](one, two)) == 1
