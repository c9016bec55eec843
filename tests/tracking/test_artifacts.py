"""Files read back exactly, and are written whole or not at all."""

from __future__ import annotations

import json
import os

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cl_moe.errors import InputError
from cl_moe.layers.routing import ExpertLoad
from cl_moe.tracking import artifacts, provenance
from cl_moe.tracking.record import Record


@pytest.fixture
def record():
    """Two experiences, an expert layer that grows after the first one."""
    random = torch.Generator().manual_seed(0)

    def load(N):
        count = torch.randint(0, 3, (N,), generator=random)
        score = torch.rand(N, generator=random, dtype=torch.float64) * (count > 0)
        return ExpertLoad(score, count, count.sum() - 1)

    return Record(
        kind="classification",
        names=["cats, dogs", 'a "name"\nin two lines'],
        rows=[torch.rand(2, generator=random, dtype=torch.float64) for _ in range(3)],
        loads=[{1: [load(N), load(N)]} for N in (3, 3, 7)],
        cohorts=[{1: [(3, 0, False)]}, {1: [(3, 0, False)]}, {1: [(3, 0, True), (4, 1, False)]}],
        ledger=[{"experience": 1, "act": "grow", "layer": 1, "num_experts": 4}],
    )


def test_all_of_them(record, tmp_path):
    written = artifacts.write_artifacts(record, tmp_path / "new")
    names = {"accuracy_matrix.csv", "ledger.json", "expert_load.parquet", "leak.csv"}
    assert {path.name for path in written} == names == set(os.listdir(tmp_path / "new"))
    record.loads = [{}, {}, {}]
    assert {path.name for path in artifacts.write_artifacts(record, tmp_path / "dense")} == names
    assert pd.read_parquet(tmp_path / "dense" / "expert_load.parquet").empty


def test_matrix_reads_back_exactly(record, tmp_path):
    path = artifacts.write_matrix(record, tmp_path / "m.csv")
    back = artifacts.read_matrix(path)
    assert torch.equal(back.scores, record.matrix)
    assert back.names == record.names
    frame = pd.read_csv(path, dtype=str)
    assert list(frame.columns) == ["experiences_trained", *record.names]
    assert frame["experiences_trained"].tolist() == ["0", "1", "2"]
    np.testing.assert_array_equal(frame.iloc[:, 1:].to_numpy().astype(float), record.matrix.numpy())


@settings(max_examples=25)
@given(
    arrays(np.float64, st.tuples(st.integers(1, 4), st.integers(1, 4)), elements=st.floats(-1e300, 1e300)),
    st.data(),
)
def test_any_matrix_reads_back(tmp_path_factory, matrix, data):
    texts = st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), max_size=8)
    names = data.draw(st.lists(texts, min_size=matrix.shape[1], max_size=matrix.shape[1]))
    record = Record("language", names, rows=[torch.from_numpy(row) for row in matrix])
    back = artifacts.read_matrix(artifacts.write_matrix(record, tmp_path_factory.mktemp("m") / "m.csv"))
    assert torch.equal(back.scores, record.matrix)
    assert back.names == names


@pytest.mark.parametrize(
    "text", ["", "a,b\n0,1\n", "experiences_trained,b\n1,0.5\n", "experiences_trained,b\n0\n"]
)
def test_another_file_is_no_matrix(tmp_path, text):
    path = tmp_path / "m.csv"
    path.write_text(text)
    with pytest.raises(InputError, match="experiences_trained"):
        artifacts.read_matrix(path)


def test_ledger_reads_back(record, tmp_path):
    path = artifacts.write_ledger(record.ledger, tmp_path / "ledger.json")
    assert artifacts.read_ledger(path) == record.ledger == json.loads(path.read_text())


def test_loads_read_back_exactly(record, tmp_path):
    back = artifacts.read_loads(artifacts.write_loads(record, tmp_path / "l.parquet"))
    assert len(back) == 3
    for found, row in zip(back, record.loads, strict=True):
        for load, other in zip(found[1], row[1], strict=True):
            assert torch.equal(load.score, other.score)
            assert torch.equal(load.count, other.count)
            assert torch.equal(load.kept, other.kept)


def test_loads_in_long_form(record, tmp_path):
    frame = pd.read_parquet(artifacts.write_loads(record, tmp_path / "l.parquet"))
    assert dict(frame.dtypes.astype(str)) == {
        "experiences_trained": "int32",
        "layer": "int32",
        "experience": "int32",
        "expert": "int64",
        "cohort": "int32",
        "birth": "int32",
        "frozen": "bool",
        "score": "float64",
        "count": "int64",
    }
    assert (frame["count"] > 0).all()
    total = sum(int(load.count.sum()) for row in record.loads for load in row[1])
    assert frame["count"].sum() == total
    last = frame[frame["experiences_trained"] == 2]
    old = last["expert"] < 3
    assert set(last[old]["cohort"]) == {0}
    assert set(last[~old]["cohort"]) == {1}
    assert last[old]["frozen"].all()
    assert not last[~old]["frozen"].any()
    assert set(last[~old]["birth"]) == {1}
    assert not frame[frame["experiences_trained"] < 2]["frozen"].any()


def test_loads_of_nothing(tmp_path):
    none = ExpertLoad(torch.zeros(2).double(), torch.zeros(2).long(), torch.tensor(0))
    record = Record("classification", ["a"], loads=[{0: [none]}, {}], cohorts=[{}, {}])
    back = artifacts.read_loads(artifacts.write_loads(record, tmp_path / "l.parquet"))
    assert back[0][0][0].count.tolist() == [0, 0]
    assert back[1] == {}


def test_environment_names_versions_and_no_places(tmp_path):
    text = provenance.write_environment(tmp_path / "e.txt").read_text()
    lines = text.splitlines()
    assert lines[0].startswith("python 3.")
    assert f"torch=={torch.__version__}".split("+")[0] in text
    names = [line.partition("==")[0].lower() for line in lines if "==" in line]
    assert names == sorted(names)
    assert "numpy" in names
    assert "/" not in text


def test_a_failed_write_leaves_the_old_file_and_no_litter(record, tmp_path, monkeypatch):
    path = artifacts.write_ledger(record.ledger, tmp_path / "ledger.json")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="space"):
        artifacts.write_ledger([], path)
    assert artifacts.read_ledger(path) == record.ledger
    assert os.listdir(tmp_path) == ["ledger.json"]


def test_files_can_be_read_by_others(record, tmp_path):
    for path in artifacts.write_artifacts(record, tmp_path):
        assert path.stat().st_mode & 0o444 == 0o444
