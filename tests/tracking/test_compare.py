"""The comparison: right statistics, only what belongs together, every wrong option in three parts."""

import csv
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from scipy import stats

from cl_moe.errors import InputError
from cl_moe.layers.routing import ExpertLoad
from cl_moe.tracking import names, store
from cl_moe.tracking.artifacts import LOADS, MATRIX, write_loads, write_matrix
from cl_moe.tracking.compare import compare, main
from cl_moe.tracking.compare.match import Match
from cl_moe.tracking.compare.runs import read_run
from cl_moe.tracking.compare.statistics import Inference
from cl_moe.tracking.record import Record
from cl_moe.tracking.tracker import MLflowTracker

T, N = 3, 6


class Stored(NamedTuple):
    uri: str
    folder: Path
    matrices: dict[tuple[str, int], np.ndarray]


def _record(seed: int, bonus: float, kind: str = "classification", experts: bool = True) -> Record:
    draw = torch.Generator().manual_seed(seed)
    record = Record(kind, [f"digits {2 * j}-{2 * j + 1}" for j in range(T)])  # type: ignore[arg-type]
    for i in range(T + 1):
        row = torch.rand(T, generator=draw, dtype=torch.float64) * 0.5 + bonus
        record.rows.append(-row if kind == "language" else row)
        load = [
            ExpertLoad(score.double(), (score * 100).long(), torch.tensor(100))
            for score in torch.rand(T, N, generator=draw)
        ]
        record.loads.append({1: load, 3: load} if experts else {})
        record.cohorts.append({1: [(N, 0, False)], 3: [(N, 0, False)]} if experts else {})
        record.steps.append(10 * i)
    return record


def _store_run(
    uri: str, folder: Path, arm: str, seed: int, record: Record, *, status: str = "finished",
    artifacts: bool = True, experiment: str = "test", **tags: str,
) -> str:  # fmt: skip
    folder.mkdir(parents=True)
    tracker = MLflowTracker(uri, experiment)
    labels = {
        "stream": "split_digits",
        "scenario": "class",
        "strategy": arm,
        "growth": "never",
        "sweep": "one",
    }
    labels |= {"seed.init": str(seed), "seed.order": "natural", "seed.data": str(seed)} | tags
    tracker.start(folder, f"{arm} {seed}", {"arm": arm, "layer.num_experts": N}, labels)
    for i in range(len(record.rows)):
        tracker.add(names.stream_points(record, i) | names.expert_points(record, i), i)
    tracker.add({"cost/seconds": 10.0 + seed, "cost/params_total": 1234567.0}, 30)
    if artifacts:
        tracker.artifact(write_matrix(record, folder / MATRIX))
        if any(record.loads):
            tracker.artifact(write_loads(record, folder / LOADS))
    tracker.finish(status)  # type: ignore[arg-type]
    return tracker.run_id


@pytest.fixture(scope="session")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    """Two arms of three seeds, one run failed, one double, and a language stream in another experiment."""
    folder = tmp_path_factory.mktemp("compare")
    uri = f"sqlite:///{folder}/mlflow.db"
    matrices = {}
    for seed in range(3):
        for arm, bonus in (("replay", 0.4), ("naive", 0.1)):
            record = _record(10 * seed + len(arm), bonus, experts=arm == "replay")
            matrices[arm, seed] = record.matrix.numpy()
            if (arm, seed) == ("replay", 0):
                _store_run(uri, folder / "old", arm, seed, _record(99, 0.0))
            _store_run(uri, folder / f"{arm}{seed}", arm, seed, record)
    _store_run(uri, folder / "bad", "naive", 7, _record(1, 0.0), status="failed")
    for seed in range(2):
        text = {"stream": "text_domains", "scenario": "domain", "sweep": "two"}
        _store_run(
            uri,
            folder / f"text{seed}",
            "lwf",
            seed,
            _record(seed, 1.0, "language"),
            **text,
            experiment="both",
        )
        _store_run(uri, folder / f"image{seed}", "naive", seed, _record(seed, 0.2), experiment="both")
    return Stored(uri, folder, matrices)


def _rows(out: Path) -> dict[str, dict[str, str]]:
    with (out / "summary.csv").open(newline="") as file:
        return {row["arm"]: row for row in csv.DictReader(file)}


def _average(matrices: Mapping[tuple[str, int], np.ndarray], arm: str) -> np.ndarray:
    return np.array([matrices[arm, seed][-1].mean() for seed in range(3)])


def test_two_arms(stored: Stored, tmp_path: Path) -> None:
    result = compare(stored.uri, "test", out=tmp_path / "out")
    figures = ("forgetting_curves", "accuracy_matrix", "expert_load", "pareto")
    drawn = {f"{name}.{suffix}" for name in figures for suffix in ("png", "svg")}
    assert {file.name for file in result.files} == {"summary.csv", "summary.tex", "report.html", *drawn}
    for file in result.files:
        assert file.stat().st_size > (0 if file.stem == "summary" else 10_000)
    rows = _rows(tmp_path / "out")
    ours, base = _average(stored.matrices, "replay"), _average(stored.matrices, "naive")
    key = "stream/average_accuracy"
    np.testing.assert_allclose(float(rows["replay"][f"{key}/mean"]), ours.mean(), rtol=1e-12)
    np.testing.assert_allclose(float(rows["replay"][f"{key}/std"]), ours.std(ddof=1), rtol=1e-12)
    expected = stats.ttest_rel(ours, base).confidence_interval(0.95)
    got = [float(rows["replay"][f"difference/{part}"]) for part in ("mean", "t_low", "t_high", "pairs")]
    np.testing.assert_allclose(got, [(ours - base).mean(), expected.low, expected.high, 3], rtol=1e-9)
    assert rows["replay"]["difference/low"] == rows["replay"]["difference/t_low"]  # of three pairs
    assert float(rows["replay"]["difference/p"]) == pytest.approx(0.25)  # three pairs, all better
    assert rows["replay"]["baseline"] == "naive"
    assert rows["naive"]["difference/mean"] == ""
    assert [rows["naive"][column] for column in ("runs", "seeds", "orders")] == ["3", "3", "1"]
    assert result.comparisons[0].rows[0].arm == "naive"
    notes = " ".join(result.notes)
    assert "1 failed" in notes
    assert "replay (1)" in notes


def test_experts_are_averaged_over_layers(stored: Stored) -> None:
    client = store.open_store(stored.uri)
    found = client.get_experiment_by_name("test")
    for run in client.search_runs(
        [found.experiment_id], "params.arm = 'replay' and attributes.status = 'FINISHED'"
    ):
        values = [run.data.metrics[f"experts/layer_0{layer}/unevenness"] for layer in (1, 3)]
        np.testing.assert_allclose(read_run(run).metrics["experts/unevenness"], np.mean(values), rtol=1e-12)


def test_streams_are_never_averaged(stored: Stored, tmp_path: Path) -> None:
    result = compare(stored.uri, "both", out=tmp_path)
    assert [one.stream for one in result.comparisons] == ["text_domains (domain)", "split_digits (class)"]
    assert [one.metric for one in result.comparisons] == ["stream/average_loss", "stream/average_accuracy"]
    assert (tmp_path / "text_domains_domain" / "forgetting_curves.png").exists()
    assert (tmp_path / "split_digits_class" / "accuracy_matrix.png").exists()
    only = compare(stored.uri, "both", out=tmp_path / "two", sweep="two", baseline="lwf")
    assert [one.baseline for one in only.comparisons] == ["lwf"]


def test_group_by_keys_metric_and_baseline(stored: Stored, tmp_path: Path) -> None:
    keys = ("strategy", "layer.num_experts")
    result = compare(stored.uri, "test", group_by=keys, metric="stream/forgetting", out=tmp_path,
                     baseline="strategy=replay, layer.num_experts=6")  # fmt: skip
    assert [row.arm for row in result.comparisons[0].rows][1] == "strategy=naive, layer.num_experts=6"
    assert next(iter(result.comparisons[0].rows[0].metrics)) == "stream/forgetting"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"experiment": "nothing"}, "--experiment"),
        ({"metric": "stream/average_acuracy"}, "stream/average_accuracy"),
        ({"group_by": ("colour",)}, "--group-by"),
        ({"baseline": "joint"}, "--baseline"),
        ({"sweep": "nine"}, "--sweep"),
        ({"uri": "mlruns"}, "--uri"),
        ({"uri": "sqlite:////no/such/file.db"}, "--uri"),
        ({"match": Match("cost/train_flop")}, "--match"),
        ({"match": Match("stream/forgetting")}, "--match"),
        ({"match": Match("cost/seconds", -0.1)}, "--tolerance"),
        ({"group_by": ()}, "--group-by"),
        ({"sweep": "zz"}, "allowed: one"),
        ({"how": Inference(resamples=1)}, "--resamples"),
    ],
)
def test_bad_input(options: dict[str, str], words: str, stored: Stored, tmp_path: Path) -> None:
    arguments = {"uri": stored.uri, "experiment": "test", "out": tmp_path / "out"} | options
    with pytest.raises(InputError, match=words):
        compare(**arguments)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_out_is_a_file(stored: Stored, tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(InputError, match="--out"):
        compare(stored.uri, "test", out=tmp_path / "out")


def test_runs_without_artifacts_still_have_a_table(stored: Stored, tmp_path: Path) -> None:
    shutil.copy(stored.folder / "mlflow.db", tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    _store_run(uri, tmp_path / "run", "naive", 0, _record(0, 0.1), artifacts=False, experiment="bare")
    result = compare(uri, "bare", out=tmp_path / "out")
    assert {file.name for file in result.files} >= {"summary.csv", "pareto.png", "report.html"}
    assert not (tmp_path / "out" / "forgetting_curves.png").exists()
    assert MATRIX in " ".join(result.notes)


def test_command_prints_and_names_files(
    stored: Stored, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    main(["--uri", stored.uri, "--experiment", "test"])
    printed = capsys.readouterr().out
    server = f"mlflow server --backend-store-uri {stored.uri} --host 127.0.0.1 --port 5000"
    for expected in ("naive", "replay", "accuracy", "comparison/summary.csv", "expert_load.png", server):
        assert expected in printed
    tables = printed.split("Written:")[0]
    assert max(len(line.rstrip()) for line in tables.splitlines()) <= 100
    assert "one order of the experiences" in " ".join(printed.split()).lower()


def test_command_fails_in_three_parts(
    stored: Stored, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    with pytest.raises(SystemExit) as exit_:
        main(["--uri", stored.uri, "--experiment", "nothing"])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert [line.split(":")[0] for line in error.splitlines()] == ["got", "allowed", "change"]
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(InputError):
        main(["--uri", stored.uri, "--experiment", "nothing"])


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom cl_moe.tracking.compare import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print([m for m in ('mlflow', 'torch', 'matplotlib', 'rich', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
