"""Evaluation inside experiences leaves no trace in training, and sees what a naive look sees."""

from __future__ import annotations

import copy
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from torch import nn

from cl_moe import launch
from cl_moe.anytime import Anytime, untouched
from cl_moe.batches import probe_rows
from cl_moe.errors import InputError
from cl_moe.experiment import run_experiment
from cl_moe.learner import Learner
from cl_moe.measuring import Measuring
from cl_moe.run import Run
from cl_moe.tracking.names import all_points

SMALL = (
    *("tracking=none", "stream.tune_on_first=3", "trainer.epochs=2", "trainer.batch_size=100"),
    *("trainer.eval_batch_size=64", "model.width=16", "checkpoint.every_minutes=null"),
)
MOE = (
    "layer=moe",
    "layer.hidden=8",
    "layer.num_experts=4",
    "growth=every_experience",
    "growth.num_experts=2",
)
TEXT = (
    *("stream=text_domains", "stream.train_bytes=6000", "stream.test_bytes=2000", "stream.context=32"),
    *("trainer.batch_size=32", "growth=never"),
)
ARMS = {
    "plain": ("strategy=replay",),
    "experts that drop out": (*MOE, "strategy=[replay,lwf]", "layer.dropout=0.5", "trainer.accumulate=2"),
    "batch norm": ("layer=peer", "layer.num_experts=16", "layer.k=2", "layer.heads=2", "optimizer=adamw"),
    "spans hidden": (*TEXT, "model=encoder", "layer=moe", "router=gshard"),
}
differences = runpy.run_path(str(Path(__file__).with_name("chaos.py")))["differences"]
Make = Callable[..., Run]


pytestmark = pytest.mark.usefixtures("no_drawing")


@pytest.fixture
def make(composed: Callable[..., DictConfig], tmp_path: Path) -> Make:
    def build(*words: str) -> Run:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        return launch.build(composed(*SMALL, *words, f"output_dir={folder}"))

    return build


@pytest.mark.parametrize(
    "arm", [arm if arm == "plain" else pytest.param(arm, marks=pytest.mark.slow) for arm in ARMS]
)
def test_training_does_not_notice(arm: str, make: Make):
    runs = [make(*ARMS[arm], *more) for more in ((), ("eval.every=1", "eval.samples=20"))]
    ends = []
    for run in runs:
        run_experiment(run)
        state = run.learner.whole_state() | {"modes": [part.training for part in run.learner.modules()]}
        ends.append((state, run.measured.matrix, run.cost.points()["cost/train_flops"]))
    assert differences(*ends) == []
    assert runs[1].measured.anytime
    assert not runs[0].measured.anytime


def test_it_looks_when_it_is_due_and_sees_what_is_there(make: Make, monkeypatch: pytest.MonkeyPatch):
    """Scores against a copy of the model that answers for itself, charged to nobody's training."""
    run = make(*MOE, "eval.every=2", "eval.window=3", "eval.samples=30")
    original, looks = Anytime.points, []

    def looking(self: Anytime, record: Any, step: int) -> dict[str, float]:
        found = original(self, record, step)
        if found:
            looks.append((step, record.steps[-1], found, naive(run, len(record.rows) - 1)))
        return found

    accounts = []
    answer = Learner.answer
    monkeypatch.setattr(Anytime, "points", looking)
    monkeypatch.setattr(
        Learner, "answer", lambda self, *args: accounts.append(self.charges._account) or answer(self, *args)
    )
    run_experiment(run)
    assert [step - boundary for step, boundary, _, _ in looks] == [2, 2, 2]
    for _, _, found, expected in looks:
        assert list(found.values()) == pytest.approx(expected)
    assert set(accounts) == {"eval", "diagnostics"}
    assert [len(found) for _, _, found, _ in looks] == [1, 2, 3]


@torch.no_grad()
def naive(run: Run, present: int) -> list[float]:
    model, scores = copy.deepcopy(run.learner.model).eval(), []
    for experience in run.stream[: present + 1]:
        rows = probe_rows(len(experience.test), 30)
        inputs, targets = (part[rows] for part in experience.test.tensors)
        answers = torch.tensor(model.head.classes)[model(inputs)[0].argmax(dim=1)]
        scores.append((answers == targets).double().mean().item())
    return scores


def test_every_step_but_the_last_is_seen_once(make: Make):
    """An epoch's last batch too, also where its gradients were not accumulated to the end."""
    run = make("trainer.accumulate=2", "eval.every=1", "eval.samples=5", "stream.cut=2")
    run_experiment(run)
    for e, (steps, _) in run.measured.anytime.items():
        assert steps.tolist() == list(range(run.measured.steps[e] + 1, run.measured.steps[e + 1]))
    parts = run.measured.anytime[1][1]
    assert torch.equal(parts[:, 0], parts[:, 1]), "two parts of one experience have one test set"


def test_language_models_lose(make: Make):
    run = make(*TEXT, "model=decoder", "model.width=16", "eval.every=3", "eval.samples=8")
    run_experiment(run)
    points = all_points(run.measured, 3)
    assert points["stream/max_loss"] >= 0
    assert points["stream/worst_case_loss"] > 0
    assert points["online_loss/experience_02"] > 0
    assert not any("accuracy" in key or "calibration" in key for key in points)


def test_modes_and_generators_are_put_back():
    model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2), nn.Sequential(nn.Linear(2, 2)))
    model[1].eval()
    before, modes = torch.get_rng_state(), [part.training for part in model.modules()]
    with pytest.raises(ZeroDivisionError), untouched(model):  # noqa: PT012
        assert not any(part.training for part in model.modules())
        assert not torch.is_grad_enabled()
        torch.rand(3)
        raise ZeroDivisionError
    assert [part.training for part in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("words", "key"),
    [
        ({"every": 0}, "eval.every"),
        ({"every": 2.0}, "eval.every"),
        ({"every": True}, "eval.every"),
        ({"every": 2, "window": 0}, "eval.window"),
        ({"window": 5}, "eval.window"),
        ({"every": 5, "window": 4}, "eval.window"),
        ({"every": 5, "samples": 0}, "eval.samples"),
    ],
)
def test_what_would_measure_nothing_is_refused(words: dict[str, Any], key: str):
    with pytest.raises(InputError) as refused:
        Measuring(**words)
    assert refused.value.key.startswith(key)


def test_the_command_line_refuses_it_too(command: Callable):
    done = command("eval.window=10", "tracking=none")
    assert (done.status, "eval.window" in done.text, "Traceback" in done.text) == (2, True, False)
