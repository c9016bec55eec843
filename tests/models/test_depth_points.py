"""The share of tokens at depth: over the experiences trained, kept in checkpoints, in no expert count."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cl_moe import launch
from cl_moe.errors import InputError
from cl_moe.layers.routing import ExpertLoad
from cl_moe.tracking import names
from cl_moe.tracking.record import Record


def passed(real: int, through: int) -> ExpertLoad:
    return ExpertLoad(torch.tensor([-1.0]).double(), torch.tensor([real]), torch.tensor(through))


def test_the_share_is_over_the_experiences_trained() -> None:
    rows = [{1: [passed(40, 30), passed(60, 10)]}] * 3
    record = Record("language", ["a", "b"], [torch.zeros(2).double()] * 3, [{}] * 3, [{}] * 3, depths=rows)
    again = Record.from_state_dict(record.state_dict())
    for kept in (record, again):
        assert names.depth_points(kept, 0) == {}
        assert names.depth_points(kept, 1) == {"depth/layer_01/share": 0.75}
        points = names.all_points(kept, 2)
        assert abs(points["depth/layer_01/share"] - 0.4) < 1e-6
        assert not any(key.startswith("experts/") for key in points)


def test_it_may_be_an_objective(composed: Callable, tmp_path: Path) -> None:
    small = ("model.depth=0.5", "stream.tune_on_first=2", "tracking=none", f"output_dir={tmp_path / 'out'}")
    words = ("stream=text_domains", "model=decoder", *small)
    launch.build(composed(*words, "objective=depth/layer_01/share"))  # an objective is refused here or never
    with pytest.raises(InputError, match="layer_00"):
        launch.build(composed(*words, "objective=depth/layer_00/share"))
    rows = [{1: [passed(40, 30), passed(60, 10)]}] * 3
    record = Record("language", ["a", "b"], [torch.zeros(2).double()] * 3, [{}] * 3, [{}] * 3, depths=rows)
    assert names.objective(record, "depth/layer_01/share") == pytest.approx(0.4)


def test_a_record_from_before_there_was_depth_still_reads() -> None:
    state = Record("language", ["a"], [torch.zeros(1).double()], [{}], [{}]).state_dict()
    del state["depths"]
    assert names.depth_points(Record.from_state_dict(state), 0) == {}
