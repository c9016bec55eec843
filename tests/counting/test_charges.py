"""Who is charged, and which steps are counted rather than charged as the last of their kind."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cl_moe.counting import Charges
from cl_moe.counting.charges import EVERY

A = torch.ones(3, 5)


def work(rows: int) -> Tensor:
    """2 x rows x 5 x 7 operations."""
    return torch.ones(rows, 5) @ torch.ones(5, 7, requires_grad=True)


def step(charges: Charges, rows: int, shape: Tensor = A, **options: object) -> None:
    with charges.step("step", shape, **options):
        out = work(rows)
    with charges.backward():
        out.sum().backward()


def test_a_step_and_its_backward_pass():
    charges = Charges()
    step(charges, 3)
    assert charges.flops == {"train": 2 * (2 * 3 * 5 * 7), "eval": 0, "diagnostics": 0}


def test_later_steps_of_a_kind_are_charged_as_the_first():
    charges = Charges()
    for rows in (3, 100, 100):
        step(charges, rows)
    assert charges.flops["train"] == 3 * 2 * 210


@pytest.mark.parametrize("part", ["another shape", "another part", "another account", "another model"])
def test_what_makes_a_step_one_of_its_own(part: str):
    charges = Charges()
    step(charges, 3)
    if part == "another shape":
        step(charges, 4, torch.ones(4, 5))
    elif part == "another part":
        with charges.step("batch", A):
            work(8)
    elif part == "another account":
        with charges.account("eval"), charges.step("step", A):
            work(8)
        assert (charges.flops["train"], charges.flops["eval"]) == (420, 560)
    else:
        charges.forget(varies=False)
        step(charges, 4)
    assert sum(charges.flops.values()) == 420 + 560


def test_the_same_model_is_not_counted_anew():
    charges = Charges()
    for model, rows, known in (
        (1, 3, 3),
        (1, 4, 3),
        (2, 5, 5),
        (2, 6, 5),
        (None, 7, 7),
        (None, 8, 8),
        (2, 9, 9),
    ):
        before = charges.flops["train"]
        charges.forget(False, model)
        step(charges, rows)
        assert charges.flops["train"] - before == 4 * known * 5 * 7, (model, rows)
    charges.forget(True, 2)
    step(charges, 2)
    assert charges.flops_per_token("train") is None
    assert charges.flops["train"] - before == 4 * (9 + 2) * 5 * 7, "what varies is counted anew"


@given(st.lists(st.integers(1, 9), min_size=1, max_size=2 * EVERY + 20))
def test_where_steps_vary_each_counted_one_stands_for_those_up_to_the_next(rows: list[int]):
    charges, of_model = Charges(), Charges()
    of_model.forget(varies=True)
    expected = latest = 0
    for place, num in enumerate(rows):
        with charges.step("step", A, varies=True):
            work(num)
        with of_model.step("step", A):
            work(num)
        if place in (0, 1, 4, 16) or place % EVERY == 0:
            latest = 2 * num * 5 * 7
        expected += latest
    assert charges.flops["train"] == of_model.flops["train"] == expected


@given(st.lists(st.integers(1, 9), min_size=2, max_size=30), st.integers(1, 29))
def test_who_goes_on_is_charged_the_same(rows: list[int], stop: int):
    through, first, second = Charges(), Charges(), Charges()
    for num in rows:
        step(through, num, varies=True, tokens=3)
    for num in rows[:stop]:
        step(first, num, varies=True, tokens=3)
    second.load_state_dict(first.state_dict(), first.clock())
    for num in rows[stop:]:
        step(second, num, varies=True, tokens=3)
    assert second.state_dict() == through.state_dict()
    assert second.flops_per_token("train") == through.flops_per_token("train")


def test_a_state_stands_still_while_the_charges_go_on():
    charges = Charges()
    step(charges, 3)
    state = charges.state_dict()
    kept = Charges()
    kept.load_state_dict(state, charges.clock())
    step(charges, 3)
    assert state["flops"]["train"] == kept.flops["train"] == 420


def test_a_part_inside_a_step_is_charged_once():
    for inner in ("step", "counting"):
        charges = Charges()
        for _ in range(2):
            with charges.step("step", A):
                work(3)
                with charges.step("inner", A) if inner == "step" else charges.counting():
                    work(3)
        assert charges.flops["train"] == 2 * 2 * 210


def test_counting_counts_always_unless_it_is_not_asked():
    charges = Charges()
    for rows in (3, 4):
        with charges.counting():
            work(rows)
    with charges.counting(False):
        work(9)
    assert charges.flops["train"] == 2 * 5 * 7 * 7


def test_a_failure_leaves_nothing_behind():
    charges = Charges()
    with pytest.raises(KeyError), charges.account("eval"), charges.step("step", A):
        raise KeyError
    work(3)  # not counted by a mode that was left on
    assert charges.flops["eval"] == charges.flops["train"] == 0
    step(charges, 3)
    assert charges.flops["train"] == 420


def test_what_diagnostics_ask_for_is_theirs():
    charges = Charges()
    with charges.account("diagnostics"), charges.account("eval"), charges.step("step", A):
        work(3)
    assert charges.flops == {"train": 0, "eval": 0, "diagnostics": 210}


def test_tokens_of_the_last_evaluation():
    charges = Charges()
    assert charges.flops_per_token("eval") is None
    with charges.account("eval"):
        for rows in (3, 6):
            charges.forget(varies=False)
            for _ in range(4):
                with charges.step("test", A, tokens=2 * rows):
                    work(rows)
    with charges.account("diagnostics"), charges.step("test", A, tokens=1):
        work(9)
    assert charges.flops_per_token("eval") == 2 * 5 * 7 / 2


def test_seconds_are_those_of_the_innermost_account(monkeypatch: pytest.MonkeyPatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    charges = Charges()
    with charges.account("train"):
        now[0] += 5
        with charges.account("diagnostics"):
            now[0] += 2
        now[0] += 1
        assert charges.seconds("train") == 6
    now[0] += 50
    with charges.account("eval"):
        now[0] += 3
    now[0] += 50
    assert charges.clock() == {"train": 6, "eval": 3, "diagnostics": 2}
