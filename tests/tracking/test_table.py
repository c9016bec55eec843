"""What a run prints fits 80 columns and says the numbers."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

from cl_moe.layers.routing import ExpertLoad
from cl_moe.tracking.record import Record
from cl_moe.tracking.table import boundary_line, run_table

R = [[0.1, 0.2, 0.3], [0.9, 0.2, 0.3], [0.5, 0.8, 0.3], [0.4, 0.7, 0.6]]
COSTS = {
    "cost/seconds": 1234.5,
    "cost/params_total": 123456789,
    "cost/buffer_bytes": 3 * 2**20,
    "cost/train_flops": 2.5e12,
    "cost/other": 1,
}


def record_of(rows=4, kind="classification", names=("a", "b", "c"), experts=0):
    load = ExpertLoad(torch.tensor([1.0, 0.0]).double(), torch.tensor([3, 0]), torch.tensor(2))
    return Record(
        kind,
        list(names),
        rows=[torch.tensor(row, dtype=torch.float64) - (kind == "language") * 3 for row in R[:rows]],
        loads=[{1: [load] * 3} if experts else {} for _ in range(rows)],
        cohorts=[{1: [(1, 0, True), (1, 1, False)]} if experts else {} for _ in range(rows)],
    )


def printed(thing, width=80):
    file = io.StringIO()
    Console(file=file, width=width, force_terminal=False).print(thing)
    return file.getvalue()


def cells(text, name):
    """The cells of the row that starts with a name."""
    (row,) = [line for line in text.splitlines() if line.startswith(f"│ {name} ")]
    return [cell.strip() for cell in row.strip("│").split("│")]


def test_a_row_per_experience():
    text = printed(run_table(record_of(experts=2), COSTS))
    assert cells(text, "a") == ["a", "0.100", "0.900", "0.400", "+0.500"]
    assert cells(text, "b") == ["b", "0.200", "0.800", "0.700", "+0.100"]
    assert cells(text, "c") == ["c", "0.300", "0.600", "0.600", "-"]
    for part in (
        "average accuracy 0.567",
        "forgetting 0.300",
        "backward transfer -0.300",
        "layer_01: 2 experts, 1 frozen, 50.0% used, 0.693 nats uneven, 33.3% dropped",
        "seconds 1,234.5",
        "parameters 123,456,789",
        "training 2.5 TFLOPs",
        "buffers 3.0 MiB",
    ):
        assert part in text, part


def test_language_shows_losses():
    text = printed(run_table(record_of(kind="language")))
    assert cells(text, "a") == ["a", "2.900", "2.100", "2.600", "+0.500"]
    assert "nats" in text
    assert "accuracy" not in text.lower()


@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("names", [("a", "b", "c"), ("[bold]x", "an_extremely_long_name_" * 4, "ü" * 50)])
def test_it_fits_80_columns_at_any_point(rows, names):
    record = record_of(rows, names=names, experts=2)
    text = printed(run_table(record, COSTS))
    assert max(len(line) for line in text.splitlines()) <= 80
    assert names[0] in text  # no markup is read into a name
    assert "forgetting" in text
    assert text.count("before") == 1
    for i in range(rows):
        assert max(len(line) for line in boundary_line(record, i).splitlines()) <= 80


def test_a_line_per_boundary():
    record = record_of(experts=2)
    assert boundary_line(record, 0) == "before training: mean accuracy 0.200, 2 experts"
    assert boundary_line(record, 1) == "1/3 a: accuracy 0.900, average 0.900, 2 experts"
    assert boundary_line(record, 2) == "2/3 b: accuracy 0.800, average 0.650, forgetting 0.400, 2 experts"
    dense = record_of(kind="language")
    assert boundary_line(dense, 2) == "2/3 b: loss 2.200, average 2.350, forgetting 0.400"
