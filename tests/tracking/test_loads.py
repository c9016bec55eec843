"""Loads go into a file per row and come back as one table, whole, or without what is gone."""

from __future__ import annotations

import copy
import os

import pytest
import torch

from cl_moe.layers.routing import ExpertLoad
from cl_moe.tracking.loads import LOADS, ROWS, copy_rows, keep_row, read_loads, write_loads
from cl_moe.tracking.record import Record

COHORTS = [[(3, 0, False)], [(3, 0, False)], [(3, 0, True), (4, 1, False)], [(3, 0, True), (4, 1, False)]]


@pytest.fixture
def whole() -> Record:
    """Three experiences, two layers, one of which grows."""
    random = torch.Generator().manual_seed(0)

    def load(N: int) -> ExpertLoad:
        count = torch.randint(0, 3, (N,), generator=random)
        score = torch.rand(N, generator=random, dtype=torch.float64) * (count > 0)
        return ExpertLoad(score, count, count.sum())

    sizes = [sum(size for size, _, _ in row) for row in COHORTS]
    return Record(
        kind="classification",
        names=["a", "b", "c"],
        rows=[torch.rand(3, generator=random, dtype=torch.float64) for _ in COHORTS],
        loads=[{1: [load(N) for _ in range(3)], 4: [load(2) for _ in range(3)]} for N in sizes],
        cohorts=[{1: row, 4: [(2, 0, False)]} for row in COHORTS],
    )


def kept(whole: Record, folder) -> Record:
    """The record as it is after its rows were measured one by one."""
    record = Record(whole.kind, whole.names)
    for i in range(len(whole.rows)):
        for part in ("rows", "loads", "cohorts"):
            getattr(record, part).append(copy.copy(getattr(whole, part)[i]))
        keep_row(record, folder)
    return record


def test_a_table_from_files_is_that_of_a_record_with_everything(whole, tmp_path):
    record = kept(whole, tmp_path)
    assert [bool(row) for row in record.loads] == [False, False, False, True]
    one = read_loads(write_loads(record, tmp_path / LOADS))
    other = read_loads(write_loads(whole, tmp_path / "other.parquet"))
    assert (tmp_path / LOADS).read_bytes() == (tmp_path / "other.parquet").read_bytes()
    for i, row in enumerate(whole.loads):
        for layer, loads in row.items():
            for mine, theirs, load in zip(one[i][layer], other[i][layer], loads, strict=True):
                for part, again, first in zip(mine, theirs, load, strict=True):
                    assert torch.equal(part, first)
                    assert torch.equal(again, first)
    assert sorted(os.listdir(tmp_path / ROWS)) == [f"{i:03d}.parquet" for i in range(4)]


def test_a_row_that_is_measured_again_is_written_again(whole, tmp_path):
    record = kept(whole, tmp_path)
    before = (tmp_path / ROWS / "003.parquet").read_bytes()
    keep_row(record, tmp_path)
    assert (tmp_path / ROWS / "003.parquet").read_bytes() == before


@pytest.mark.parametrize("harm", ["missing", "cut", "another", "link"])
def test_a_row_that_is_gone_is_left_out_with_a_warning(harm, whole, tmp_path, caplog):
    record, file = kept(whole, tmp_path), tmp_path / ROWS / "001.parquet"
    content = file.read_bytes()
    file.unlink()
    if harm == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif harm == "another":
        file.write_bytes((write_loads(whole, tmp_path / "w.parquet")).read_bytes())
    elif harm == "link":
        (tmp_path / "elsewhere").write_bytes(content)
        file.symlink_to(tmp_path / "elsewhere")
    back = read_loads(write_loads(record, tmp_path / LOADS))
    assert "001.parquet is missing or damaged" in caplog.text
    assert [bool(row) for row in back] == [True, False, True, True]
    assert torch.equal(back[2][1][0].count, whole.loads[2][1][0].count)


def test_a_branch_gets_the_rows_of_its_parent_up_to_where_it_starts(whole, tmp_path):
    kept(whole, tmp_path / "parent")
    (tmp_path / "parent" / ROWS / "001.parquet").unlink()
    (tmp_path / "parent" / ROWS / "001.parquet").symlink_to("002.parquet")
    copy_rows(tmp_path / "parent", tmp_path / "child", 2)
    assert sorted(os.listdir(tmp_path / "child" / ROWS)) == ["000.parquet", "002.parquet"]
    copy_rows(tmp_path / "nowhere", tmp_path / "other", 2)
    assert not (tmp_path / "other").exists()


def test_a_dense_model_leaves_no_files_and_no_warning(tmp_path, caplog):
    record = Record("language", ["a"], rows=[torch.zeros(1)], loads=[{}], cohorts=[{}])
    keep_row(record, tmp_path)
    assert read_loads(write_loads(record, tmp_path / LOADS)) == [{}]
    assert os.listdir(tmp_path) == [LOADS]
    assert not caplog.text
