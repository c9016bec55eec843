"""What a multirun leaves in MLflow: tags, params, artifacts, and every point on its axis, once."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from cl_moe.tracking import artifacts, compare

TAGS = {
    *("stream", "scenario", "model", "layer", "router", "growth", "freeze", "strategy"),
    *("seed.init", "seed.order", "seed.data", "git_commit", "git_dirty", "sweep", "world_size", "status"),
    *("definitions", "data_checksum"),
}
ARTIFACTS = {
    *("config.yaml", "accuracy_matrix.csv", "accuracy_matrix.png", "forgetting_curves.png"),
    *("ledger.json", "environment.txt", "expert_load.parquet", "expert_load.png"),
    *("command.yaml", "data.json", "leak.csv", "model", "stream.json"),
}
WHERE_THERE_IS = {"git.diff", "cohort_load.png", "leak_matrix.png", "forgetting_parts.png", "depth_share.png"}
WHERE_THERE_IS |= {"samples.png", "samples.txt"}
STREAM = {"average_accuracy", "forgetting", "backward_transfer", "average_anytime_accuracy"}
STREAM |= {"learning_accuracy", "forward_transfer"}
LOADS = {"usage", "unevenness", "entropy", "effective_experts", "gini", "max_violation", "dead_fraction"}
LOADS |= {"drop_rate", "squared_cv", "num_experts", "num_frozen"}
COSTS = {"seconds", "tokens_per_second", "params_total", "params_trainable", "buffer_bytes", "eval_seconds"}
COSTS |= {"train_flops", "eval_flops", "inference_flops_per_token", "params_active", "peak_memory_bytes"}
COSTS |= {"diagnostics_flops", "diagnostics_seconds", "diagnostics_bytes"}
COSTS |= {"param_bytes", "optimizer_bytes", "examples_seen"}
SMALL = ("trainer.epochs=1", "hydra.sweep.dir=sweep", "trainer.log_every=4")


def client_of(folder: Path) -> MlflowClient:
    return MlflowClient(f"sqlite:///{folder}/mlflow.db")


def runs(folder: Path) -> list[Run]:
    client = client_of(folder)
    found = client.search_runs([e.experiment_id for e in client.search_experiments()], max_results=1000)
    return [run for run in found if "sweep_parent" not in run.data.tags]


def steps_of(client: MlflowClient, run: Run, key: str) -> list[int]:
    """Steps in the order in which they were noted."""
    history = client.get_metric_history(run.info.run_id, key)
    stamps = [metric.timestamp for metric in history]
    assert len(set(stamps)) == len(stamps)
    return [metric.step for metric in sorted(history, key=lambda metric: metric.timestamp)]


def check_run(client: MlflowClient, run: Run, num_experiences: int) -> None:
    assert (run.info.status, run.data.tags["status"]) == ("FINISHED", "finished")
    assert run.data.tags.keys() >= TAGS
    assert run.data.params.keys() >= {"arm", "seed.init", "optimizer.lr", "trainer.epochs"}
    experts = run.data.tags["layer"] != "dense"
    names = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert names - WHERE_THERE_IS == ARTIFACTS
    assert ("leak_matrix.png" in names) == (run.data.tags["growth"] != "never")
    check_axes(client, run, num_experiences)
    keys = set(run.data.metrics)
    assert keys >= {f"stream/{name}" for name in STREAM} | {f"cost/{name}" for name in COSTS}
    if experts:
        assert keys >= {f"experts/layer_00/{name}" for name in LOADS} | {"growth/num_experts"}
    else:
        assert not any(key.startswith(("experts/", "growth/")) for key in keys)


def check_axes(client: MlflowClient, run: Run, num_experiences: int) -> None:
    for key in run.data.metrics:
        steps = steps_of(client, run, key)
        assert all(one < two for one, two in pairwise(steps)), key
        if key.startswith("accuracy/"):
            assert steps == list(range(num_experiences + 1))
        elif not key.startswith(("train/", "cost/")):
            assert set(steps) <= set(range(num_experiences + 1)), key
    total = steps_of(client, run, "cost/params_total")
    assert total[0] == 0
    assert len(steps_of(client, run, "train/loss")) > num_experiences
    assert steps_of(client, run, "train/loss")[-1] < total[-1]


def test_a_multirun_in_mlflow_and_its_comparison(command: Callable, tmp_path: Path):
    arms = ("strategy=naive,lwf", "layer=dense,moe", "layer.hidden=16", "seed.init=0,1")
    done = command("-m", *SMALL, *arms, "stream.tune_on_first=2", "growth=never")
    assert done.status == 0, done.text
    client, found = client_of(tmp_path), runs(tmp_path)
    assert len(found) == 8
    for run in found:
        check_run(client, run, 2)
        matrix = artifacts.read_matrix(Path(run.data.tags["output_dir"]) / artifacts.MATRIX).scores
        history = client.get_metric_history(run.info.run_id, "accuracy/experience_00")
        assert [m.value for m in sorted(history, key=lambda m: m.step)] == pytest.approx(
            matrix[:, 0].tolist()
        )
    assert {run.data.tags["sweep"] for run in found} == {"sweep"}
    rest = "layer.hidden=16 stream.tune_on_first=2 trainer.epochs=1 trainer.log_every=4"
    assert {run.data.params["arm"] for run in found} == {
        f"{layer} {name} {rest}" for layer in ("dense", "moe top_k") for name in ("naive", "lwf")
    }
    _compare(tmp_path, 4, 2)


def _compare(folder: Path, num_arms: int, num_seeds: int) -> None:
    out = folder / "comparison"
    compare.main(["--uri", f"sqlite:///{folder}/mlflow.db", "--out", str(out)])
    for name in ("summary.csv", "forgetting_curves.png", "accuracy_matrix.png", "expert_load.png"):
        assert (out / name).stat().st_size > 0
    assert len((out / "summary.csv").read_text().splitlines()) > num_arms


@pytest.mark.parametrize(
    "words",
    [
        ("layer=moe", "layer.hidden=16", "growth=every_experience", "growth.num_experts=4"),
        pytest.param(("strategy=joint",), marks=pytest.mark.slow),
        pytest.param(("stream.cut=2", "stream.tune_on_first=1"), marks=pytest.mark.slow),
    ],
    ids=["growth", "joint", "cut"],
)
def test_the_axes_of_other_runs(words: tuple[str, ...], command: Callable, tmp_path: Path):
    done = command(*SMALL, "stream.tune_on_first=2", "hydra.run.dir=out", *words)
    assert done.status == 0, done.text
    (run,) = runs(tmp_path)
    check_run(client_of(tmp_path), run, 2)
    assert run.data.tags["sweep"] == "none"
    if words[0] == "layer=moe":
        history = client_of(tmp_path).get_metric_history(run.info.run_id, "growth/num_experts")
        assert [metric.value for metric in history] == [8, 8, 12]
        assert steps_of(client_of(tmp_path), run, "growth/shock") == [1]


def test_language_has_losses_and_no_accuracy(command: Callable, tmp_path: Path):
    text = ("stream=text_domains", "stream.train_bytes=20000", "stream.test_bytes=4000", "stream.context=32")
    done = command(*SMALL, *text, "stream.tune_on_first=2", "model.width=32", "hydra.run.dir=out")
    assert done.status == 0, done.text
    (run,) = runs(tmp_path)
    keys, client = set(run.data.metrics), client_of(tmp_path)
    assert keys >= {"loss/experience_00", "perplexity/experience_01", "stream/average_loss"}
    assert not any("accuracy" in key for key in keys)
    assert steps_of(client, run, "loss/experience_01") == [0, 1, 2]
    (value,) = done.objectives
    assert value == pytest.approx(-run.data.metrics["stream/average_loss"])


@pytest.mark.slow
def test_the_sweep_of_the_readme(command: Callable, tmp_path: Path):
    groups = ("strategy=naive,replay,lwf", "layer=dense,moe,peer", "stream=split_digits", "seed.init=0,1,2")
    done = command("-m", *groups)
    assert done.status == 0, done.text
    client, found = client_of(tmp_path), runs(tmp_path)
    assert len(found) == 27
    for run in found:
        check_run(client, run, 5)
    assert len({run.data.tags["sweep"] for run in found}) == 1
    assert len({run.data.params["arm"] for run in found}) == 9
    _compare(tmp_path, 9, 3)
