"""What the tests of the comparison share: runs made by hand, with or without a store."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag

from cl_moe.tracking.artifacts import Matrix
from cl_moe.tracking.compare.arms import Arm, by_stream, choose_baseline, notes_on
from cl_moe.tracking.compare.left import Left
from cl_moe.tracking.compare.runs import Run
from cl_moe.tracking.compare.statistics import Inference
from cl_moe.tracking.compare.table import compare_arms
from cl_moe.tracking.compare.whole import View

ACCURACY = "stream/average_accuracy"
FEW = Inference(resamples=500)


def run_of(arm: str = "naive", init: object = 0, order: object = "natural", *, value: float | None = 0.5,
           started: int = 0, metrics: Mapping[str, float] | None = None, **about: str) -> Run:  # fmt: skip
    """A finished run; ``about`` takes ``git_commit="..."`` and, for dots, ``stream__cut="2"``."""
    labels = {"arm": arm, "stream": "digits", "scenario": "class", "strategy": arm, "growth": "never"}
    labels |= {"seed.init": str(init), "seed.order": str(order), "seed.data": "0"}
    labels |= {key.replace("__", "."): word for key, word in about.items()}
    found = {} if value is None else {ACCURACY: value}
    identity = f"{arm} {init} {order} {started} {sorted(about.items())}"
    params = frozenset(key for key in labels if "." in key or key == "arm")
    return Run(identity, started, labels, {**found, **(metrics or {})}, "", params)


def grid(arm: str, values: Mapping[tuple[object, object], float], **about: str) -> list[Run]:
    """A run per (order, init)."""
    return [run_of(arm, init, order, value=value, **about) for (order, init), value in values.items()]


def arms_of(runs: list[Run], keys: tuple[str, ...] = ("arm",), mixed: bool = False) -> list[Arm]:
    """The arms of the only stream."""
    (arms,) = by_stream(runs, keys, mixed)[0].values()
    return arms


def view_of(arms: list[Arm], T: int = 3, experts: int = 0, how: Inference = FEW, draw: int = 0) -> View:
    """A view with drawn matrices and, if there are experts, loads."""
    random = np.random.default_rng(draw)
    base = choose_baseline(arms, None)
    one = compare_arms("digits (class)", arms, base, None, how)
    left = [
        Left(
            arm.name,
            run,
            Matrix(torch.from_numpy(random.random((T + 1, T))), [f"part {j}" for j in range(T)]),
            {1: random.random((experts, T))} if experts else {},
        )
        for arm in arms
        for run in arm.runs
    ]
    return View(one, arms, left, notes_on(arms, base, one.metric))


def store_run(
    client: MlflowClient,
    experiment: str,
    arm: str,
    init: int,
    *,
    status: str = "FINISHED",
    metrics: Mapping[str, float] | None = None,
    curves: Mapping[str, list[float]] | None = None,
    artifacts: Path | None = None,
    **about: str,
) -> str:
    """A run written straight into the store; ``curves``: a value per step 0, 10, 20, ..."""
    found = client.get_experiment_by_name(experiment)
    number = found.experiment_id if found else client.create_experiment(experiment, str(artifacts))
    tags = {"stream": "digits", "scenario": "class", "strategy": arm, "growth": "never"}
    tags |= {"seed.init": str(init), "seed.order": "natural", "seed.data": "0", **about}
    run_id: str = client.create_run(number).info.run_id
    now = int(time.time() * 1000)
    points = [Metric(key, value, now, 0) for key, value in (metrics or {ACCURACY: 0.5}).items()]
    points += [
        Metric(key, value, now + k, 10 * k)
        for key, values in (curves or {}).items()
        for k, value in enumerate(values)
    ]
    client.log_batch(run_id, points, [Param("arm", arm)], [RunTag(*tag) for tag in tags.items()])
    if status != "RUNNING":
        client.set_terminated(run_id, status)
    return run_id
