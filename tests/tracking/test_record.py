"""The record survives a checkpoint."""

from __future__ import annotations

import torch

from cl_moe.layers.routing import ExpertLoad
from cl_moe.tracking.record import Record


def test_a_record_survives_a_checkpoint(tmp_path):
    load = ExpertLoad(torch.tensor([0.5, 0.0]).double(), torch.tensor([2, 0]), torch.tensor(1))
    record = Record(
        kind="language",
        names=["a", "b"],
        rows=[torch.tensor([-3.0, -4.0]).double()],
        loads=[{1: [load, load]}],
        cohorts=[{1: [(2, 0, True)]}],
        steps=[0],
        shocks={1: -0.25},
        ledger=[{"experience": 1, "act": "head", "classes": [3]}],
    )
    path = tmp_path / "record.pt"
    torch.save(record.state_dict(), path)
    back = Record.from_state_dict(torch.load(path, weights_only=True))
    assert torch.equal(back.matrix, record.matrix)
    assert isinstance(back.loads[0][1][0], ExpertLoad)
    assert torch.equal(back.loads[0][1][1].score, load.score)
    for name in ("kind", "names", "cohorts", "steps", "shocks", "ledger"):
        assert getattr(back, name) == getattr(record, name)
    assert back.experiences_trained == 0
