"""Stores as they are met: runs that are not done, values that are none, artifacts that cannot be read."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from cl_moe.errors import InputError
from cl_moe.tracking import store
from cl_moe.tracking.artifacts import LOADS, MATRIX, write_matrix
from cl_moe.tracking.compare import compare
from cl_moe.tracking.compare.match import Match
from cl_moe.tracking.compare.statistics import Inference
from cl_moe.tracking.record import Record
from cl_moe.tracking.sweeps import SWEEP_PARENT
from tests.tracking.comparisons import ACCURACY, store_run

HOW = Inference(resamples=200)


@pytest.fixture
def client(uri: str) -> MlflowClient:
    return store.open_store(uri)


@pytest.fixture
def add(client: MlflowClient, tmp_path: Path) -> Callable[..., str]:
    """``add(arm, init, ...)`` writes a run into the experiment ``test``."""
    return lambda arm, init, **about: store_run(
        client, "test", arm, init, artifacts=tmp_path / "artifacts", **about
    )


def row_of(out: Path, arm: str) -> dict[str, str]:
    with (out / "summary.csv").open(newline="") as file:
        return {row["arm"]: row for row in csv.DictReader(file)}[arm]


def put_matrix(client: MlflowClient, run_id: str, rows: list[list[float]], folder: Path) -> None:
    record = Record("classification", [f"part {j}" for j in range(len(rows[0]))])
    record.rows += [torch.tensor(row, dtype=torch.float64) for row in rows]
    client.log_artifact(run_id, str(write_matrix(record, folder / MATRIX)))


def test_runs_that_are_not_finished_are_named_and_not_averaged(
    add: Callable[..., str], uri: str, tmp_path: Path
) -> None:
    add("naive", 0, metrics={ACCURACY: 0.5})
    for k, status in enumerate(("RUNNING", "FAILED", "KILLED", "RUNNING"), 1):
        add("naive" if k < 4 else "lwf", k, status=status, metrics={ACCURACY: 99.0})
    result = compare(uri, "test", out=tmp_path / "out", how=HOW)
    assert result.comparisons[0].rows[0].metrics[ACCURACY][::2] == (0.5, 1)
    assert result.notes[0] == (
        "Left out, since they are not finished: 1 failed (naive), 2 running (naive, lwf), 1 stopped (naive)."
    )


def test_an_experiment_without_a_finished_run(
    add: Callable[..., str], client: MlflowClient, uri: str, tmp_path: Path
) -> None:
    client.create_experiment("empty", str(tmp_path))
    with pytest.raises(InputError, match="no finished run among the 0"):
        compare(uri, "empty", out=tmp_path / "out")
    add("naive", 0, status="FAILED")
    with pytest.raises(InputError, match=r"among the 1 of experiment 'test' \(1 failed \(naive\)\)"):
        compare(uri, "test", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_parent_of_a_sweep_is_no_run(
    add: Callable[..., str], client: MlflowClient, uri: str, tmp_path: Path
):
    add("naive", 0)
    number = client.get_experiment_by_name("test").experiment_id
    client.create_run(number, tags={SWEEP_PARENT: "token"})
    assert not any("not finished" in note for note in compare(uri, "test", out=tmp_path, how=HOW).notes)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_no_value(
    value: float, add: Callable[..., str], uri: str, tmp_path: Path
) -> None:
    for init in range(3):
        add("naive", init, metrics={ACCURACY: 0.5})
        add("lwf", init, metrics={ACCURACY: 0.75 if init else value})
    result = compare(uri, "test", out=tmp_path / "out", how=HOW)
    row = row_of(tmp_path / "out", "lwf")
    assert (row[f"{ACCURACY}/mean"], row[f"{ACCURACY}/count"], row["runs"]) == ("0.75", "2", "3")
    assert (row["difference/mean"], row["difference/pairs"]) == ("0.25", "2")
    said = " ".join(result.notes)
    assert f"No finite {ACCURACY} in 1 of 3 runs of lwf" in said
    assert "lwf lacks init=0" in said


def test_a_missing_seed_is_named(add: Callable[..., str], uri: str, tmp_path: Path) -> None:
    for init in range(3):
        add("naive", init, metrics={ACCURACY: float(init)})
    add("lwf", 1, metrics={ACCURACY: 5.0})
    add("lwf", 7, metrics={ACCURACY: 100.0})
    result = compare(uri, "test", out=tmp_path / "out", how=HOW)
    assert float(row_of(tmp_path / "out", "lwf")["difference/mean"]) == 4.0
    said = " ".join(result.notes)
    assert "naive lacks init=7 order=natural data=0 (of lwf)" in said
    assert "lwf lacks init=0 order=natural data=0, init=2" in said


def test_artifacts_that_cannot_be_read_are_named(
    add: Callable[..., str], client: MlflowClient, uri: str, tmp_path: Path
) -> None:
    rows = [[0.1, 0.1], [0.9, 0.1], [0.5, 0.8]]
    with_experts = {ACCURACY: 0.5, "experts/layer_01/usage": 0.5}
    good, short, broken, _none, nan = (add("naive", init, metrics=with_experts) for init in range(5))
    put_matrix(client, good, rows, tmp_path)
    put_matrix(client, add("naive", 9), rows, tmp_path)
    put_matrix(client, short, rows[:2], tmp_path)
    put_matrix(client, nan, [*rows[:2], [math.nan, 0.1]], tmp_path)
    (tmp_path / MATRIX).write_bytes(b"\xff\xfe no table")
    client.log_artifact(broken, str(tmp_path / MATRIX))
    (tmp_path / LOADS).write_bytes(b"PAR1 but cut off")
    client.log_artifact(good, str(tmp_path / LOADS))
    result = compare(uri, "test", out=tmp_path / "out", how=HOW)
    said = " ".join(result.notes)
    names = ", ".join(f"naive {init}.natural.0" for init in (2, 3, 4))
    assert f"without a readable and finite {MATRIX}: {names}." in said
    assert f"with a {MATRIX} of another size: naive 1.natural.0." in said
    assert f"No readable {LOADS} of naive 0.natural.0" in said
    assert (tmp_path / "out" / "forgetting_curves.svg").stat().st_size > 1000


def test_equal_cost_from_the_store(
    add: Callable[..., str], client: MlflowClient, uri: str, tmp_path: Path
) -> None:
    """The arm costs twice as much: at the baseline's cost it stands between its rows 1 and 2."""
    naive = [[0.0, 0.0], [0.8, 0.0], [0.2, 0.8]]
    costly = [[0.0, 0.0], [1.0, 0.0], [1.0, 0.6]]
    for init in range(3):
        for arm, cost, rows in (("naive", [0.0, 40.0, 80.0], naive), ("costly", [0.0, 40.0, 200.0], costly)):
            metrics = {ACCURACY: sum(rows[-1]) / 2}
            run_id = add(arm, init, metrics=metrics, curves={"cost/train_flops": cost})
            put_matrix(client, run_id, rows, tmp_path)
    result = compare(uri, "test", out=tmp_path / "out", how=HOW, match=Match("cost/train_flops", 0.5))
    one, two = (row.matched for row in result.comparisons[0].rows)
    assert one is not None
    assert two is not None
    assert (one.ratio, one.within, one.score, one.difference) == (1.0, True, 0.5, 0.0)
    assert (two.ratio, two.within, two.spent_all, two.pairs) == (2.5, False, True, 3)
    assert two.score == pytest.approx(0.5 + 0.25 * (0.8 - 0.5))
    assert two.difference == pytest.approx(0.075)
    assert float(row_of(tmp_path / "out", "costly")["match/score"]) == two.score
    assert "score at equal cost" in (tmp_path / "out" / "report.html").read_text()
