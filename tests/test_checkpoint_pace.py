"""When a checkpoint is due inside an experience."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest

from cl_moe.checkpoint import Checkpoints, Moment
from cl_moe.errors import InputError


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("keep", wrong) for wrong in (0, -1, 1.5)),
        *(("every_steps", wrong) for wrong in (0, 2.5)),
        *(("every_minutes", wrong) for wrong in (0, -1.0, math.inf)),
    ],
)
def test_settings_that_cannot_be_are_refused(name: str, value: float) -> None:
    with pytest.raises(InputError) as caught:
        Checkpoints(**{name: value})
    assert caught.value.key == f"checkpoint.{name}"


def test_it_is_due_by_steps(tmp_path: Path) -> None:
    keeper = Checkpoints(every_steps=3, every_minutes=None)
    due = []
    for step in range(7):
        due.append(keeper.due())
        if due[-1]:
            keeper.save(tmp_path, Moment(0, step + 1), {}, best=0)
    assert due == [False, False, True, False, False, True, False]


def test_it_is_due_by_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    keeper = Checkpoints(every_minutes=2)
    assert not keeper.due()
    clock[0] += 121
    assert keeper.due()
    keeper.save(tmp_path, Moment(0, 1), {}, best=0)
    assert not keeper.due()
