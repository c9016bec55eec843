"""Online accuracy, calibration and plasticity of whole runs, against models that are asked beside them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import DictConfig
from torch import Tensor

from cl_moe import launch
from cl_moe.batches import probe_rows
from cl_moe.evaluation import evaluate
from cl_moe.experiment import run_experiment
from cl_moe.learner import Learner
from cl_moe.metrics.functional import calibration_error
from cl_moe.plasticity import observe
from cl_moe.run import Run
from cl_moe.tracking.names import all_points

SMALL = (
    *("tracking=none", "trainer.epochs=2", "trainer.batch_size=100", "trainer.eval_batch_size=37"),
    *("model.width=16", "checkpoint.every_minutes=null", "optimizer.lr=0.1"),
)
Make = Callable[..., Run]


pytestmark = pytest.mark.usefixtures("no_drawing")


@pytest.fixture
def make(composed: Callable[..., DictConfig], tmp_path: Path) -> Make:
    return lambda *words: launch.build(composed(*SMALL, *words, f"output_dir={tmp_path}"))


@torch.no_grad()
def asked(model: torch.nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) answers and their probabilities, of a copy."""
    logits = copy.deepcopy(model).eval()(inputs)[0].double()
    best = logits.softmax(dim=1).max(dim=1)
    return torch.tensor(model.head.classes)[best.indices], best.values


@pytest.mark.parametrize("strategy", ["naive", "replay"])
def test_online_accuracy_is_over_new_examples_before_they_are_learnt(
    strategy: str, make: Make, monkeypatch: pytest.MonkeyPatch
):
    original, asked_before = Learner.training_step, dict[int, list[float]]()

    def step(self: Learner, batch: Any, batch_idx: int) -> Tensor:
        index, (inputs, targets) = self.outlook().experience.index, batch
        if self.batches < -(-len(self.outlook().experience.train) // 100):  # the first of two epochs
            right = asked(self.model, inputs)[0] == targets
            asked_before.setdefault(index, []).extend(right.double().tolist())
        return original(self, batch, batch_idx)

    monkeypatch.setattr(Learner, "training_step", step)
    run = make(f"strategy={strategy}", "stream.tune_on_first=3")
    run_experiment(run)
    means = [sum(found) / len(found) for found in asked_before.values()]
    for i in (1, 2, 3):
        points = all_points(run.measured, i)
        assert len(asked_before[i - 1]) == len(run.stream[i - 1].train)
        assert points[f"online_accuracy/experience_{i - 1:02d}"] == pytest.approx(means[i - 1])
        assert points["stream/online_accuracy"] == pytest.approx(sum(means[:i]) / i)


@pytest.mark.parametrize("scenario", ["class", "domain"])
def test_calibration_is_over_the_classes_seen(scenario: str, make: Make, monkeypatch: pytest.MonkeyPatch):
    """Of experiences whose classes were never seen, too: there every answer is wrong."""
    run = make(f"stream.scenario={scenario}", "stream.tune_on_first=3", "layer=moe", "layer.hidden=8")
    original, expected = Run.close_boundary, []

    def closing(self: Run, evaluation: Any) -> None:
        model, row = self.learner.model, []
        for experience in self.stream if model.head.classes else ():
            inputs, targets = experience.test.tensors
            answers, sure = asked(model, inputs)
            row.append(calibration_error(sure, answers == targets).item())
        expected.append(row)
        original(self, evaluation)

    monkeypatch.setattr(Run, "close_boundary", closing)
    run_experiment(run)
    assert expected[0] == [] or scenario == "domain"
    for i, row in enumerate(expected):
        points = all_points(run.measured, i)
        found = [value for key, value in sorted(points.items()) if key.startswith("calibration/")]
        assert found == pytest.approx(row, abs=1e-5)
        if i >= 2:
            assert points["stream/old_calibration_error"] == pytest.approx(
                sum(row[: i - 1]) / (i - 1), abs=1e-5
            )


@pytest.mark.parametrize("samples", [40, 1_000_000])
def test_plasticity_is_of_the_newest_experiences_probe_set(samples: int, make: Make):
    run = make("stream.tune_on_first=2", f"eval.samples={samples}", "model.num_blocks=2")
    run_experiment(run)
    data = run.stream[1].test
    x = data.tensors[0][probe_rows(len(data), samples)].flatten(1)
    model = run.learner.model.cpu()
    with torch.no_grad():
        x = torch.relu(model.stem(x))
        layers = []
        for block in model.blocks:
            x = torch.relu(block(x)[0])
            layers.append(x.abs().double().mean(dim=0).numpy())
    values = np.linalg.svd(x.double().numpy(), compute_uv=False)
    share = values[values > 0] / values.sum()
    points = all_points(run.measured, 2)
    assert points["plasticity/effective_rank"] == pytest.approx(
        math.exp(-(share * np.log(share)).sum()), rel=1e-4
    )
    for index, mean in enumerate(layers):
        for name, tau in (("000", 0.0), ("025", 0.025), ("100", 0.1)):
            expected = float((mean <= tau * mean.mean()).mean())
            assert points[f"plasticity/layer_{index:02d}/dormant_{name}"] == expected
    assert not any(key.startswith("plasticity/") for key in all_points(run.measured, 0))


@pytest.mark.parametrize("layer", ["moe", "peer"])
def test_where_the_probe_set_is_the_test_set_its_evaluation_is_watched(layer: str, make: Make):
    run = make("stream.tune_on_first=2", f"layer={layer}", "eval.decomposition=never", "eval.samples=0")
    run_experiment(run)
    trainer, learner, charges = run.trainer, run.learner, run.learner.charges
    spent = [dict(charges.flops)]
    kept = evaluate(trainer, learner, run.stream[:], 37)
    spent.append(dict(charges.flops))
    found = evaluate(trainer, learner, run.stream[:], 37, 1_000_000, run.stream[1])
    spent.append(dict(charges.flops))
    assert found.seen is not None
    assert torch.equal(found.row, kept.row), "to be watched changes nothing"
    apart = observe(trainer, learner, run.stream[1], 1_000_000, 37)
    assert observe(trainer, learner, run.stream[1], 1_000_000, 37, found.seen) == apart
    spent.append(dict(charges.flops))
    of_eval, of_units = ([one[account] for one in spent] for account in ("eval", "diagnostics"))
    assert of_eval[2] - of_eval[1] == of_eval[1] - of_eval[0] > 0, "nor what it costs"
    assert of_units[1] == of_units[0] < of_units[2]
    assert of_units[3] - of_units[2] > 2 * (of_units[2] - of_units[1]), "a pass of its own, and the units"
    assert evaluate(trainer, learner, run.stream[:], 37, 1, run.stream[1]).seen is None


def test_joint_training_scores_its_data_where_it_learns_it(make: Make):
    run = make("strategy=joint", "stream.tune_on_first=2", "eval.every=2", "eval.samples=5")
    run_experiment(run)
    last = all_points(run.measured, 2)
    assert 0 <= last["stream/online_accuracy"] <= 1
    assert "online_accuracy/experience_01" not in last
    assert "online_accuracy/experience_00" in all_points(run.measured, 1)
    assert last["stream/min_accuracy"] == last["accuracy/experience_00"], "nothing was trained in between"


def test_one_experience_has_no_old_ones(make: Make):
    run = make("stream.tune_on_first=1", "eval.every=1", "eval.samples=5")
    run_experiment(run)
    points = all_points(run.measured, 1)
    assert {
        "stream/online_accuracy",
        "stream/calibration_error",
        "plasticity/effective_rank",
    } <= points.keys()
    assert (
        not {"stream/old_calibration_error", "stream/min_accuracy", "stream/worst_case_accuracy"}
        & points.keys()
    )


def test_without_a_probe_set_there_is_no_plasticity(make: Make):
    run = make("stream.tune_on_first=1", "eval.samples=0")
    run_experiment(run)
    assert not any(key.startswith("plasticity/") for key in all_points(run.measured, 1))


@pytest.mark.parametrize(
    "key",
    [
        *("stream/online_accuracy", "stream/old_calibration_error", "plasticity/effective_rank"),
        *("plasticity/layer_00/dormant_025", "stream/worst_case_accuracy"),
    ],
)
def test_each_may_be_an_objective(key: str, make: Make):
    run = make("stream.tune_on_first=2", "eval.every=3", f"objective={key}")
    assert run_experiment(run) == all_points(run.measured, 2)[key]
