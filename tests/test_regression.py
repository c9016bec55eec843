"""A stream whose targets are numbers, from its loss to its record: runs, against what numpy computes.

Legend: B batch, T experiences, G targets of an example.
"""

from __future__ import annotations

import math
import runpy
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import DictConfig
from torch.utils.data import TensorDataset

from cl_moe import checkpoint, launch, preflight
from cl_moe.batches import is_asked, padding_mask
from cl_moe.cost import num_targets
from cl_moe.errors import InputError
from cl_moe.experiment import run_experiment
from cl_moe.growth import (
    AllPast,
    EveryExperience,
    OnDrift,
    OnPlateau,
    OnSaturation,
    PastExperts,
)
from cl_moe.learner import Learner
from cl_moe.measuring import Measuring
from cl_moe.models import MLPClassifier
from cl_moe.optim import SGD
from cl_moe.run import Run
from cl_moe.scoring import Scoring
from cl_moe.seeds import generator
from cl_moe.strategies import Cumulative, Joint, Replay
from cl_moe.stream import IGNORE, UNITS, Stream, cut, is_loss
from cl_moe.tracking import artifacts, names, table
from tests.number_runs import LAYERS, Numbers, numbers, run_of

differences = runpy.run_path(str(Path(__file__).with_name("chaos.py")))["differences"]
pytestmark = pytest.mark.usefixtures("no_drawing")


def scoring_of(stream: Stream) -> Scoring:
    scoring = Scoring(stream)
    scoring.place([], torch.device("cpu"))
    return scoring


@pytest.mark.parametrize("shape", [(9,), (9, 1), (9, 3), (9, 2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_losses_and_scores_are_squared_errors(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    answers = torch.randn(shape, generator=generator(0, "answers")).to(dtype)
    targets = torch.randn(shape, generator=generator(0, "targets"))
    targets.view(-1)[4] = IGNORE  # a number like any other
    scoring = scoring_of(numbers())
    squares = (answers.double().numpy() - targets.double().numpy()) ** 2
    loss = scoring.task_loss(answers, targets)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert loss.item() == pytest.approx(squares.mean(), rel=1e-6)
    losses_B = scoring.losses(answers, targets)
    assert losses_B.dtype == torch.float64
    np.testing.assert_allclose(losses_B.numpy(), squares.reshape(9, -1).mean(axis=1), rtol=1e-12)
    total, count = scoring.score(answers, targets)
    assert total.dtype == torch.float64
    assert (total.item(), int(count)) == (pytest.approx(-squares.sum(), rel=1e-12), squares.size)
    for num_new in (9, 5, 0):
        total, count = scoring.of_new(answers, targets, num_new, loss)
        assert int(count) == num_new * squares[0].size
        assert total.item() == pytest.approx(-squares[:num_new].sum(), rel=1e-6)
    assert int(scoring.asked(targets)) == squares.size
    assert scoring.calibration(answers, targets) is None
    assert len(scoring.losses(answers[:0], targets[:0])) == 0


def test_every_number_is_asked_for() -> None:
    targets = torch.tensor([[-100.0], [1.0]])
    assert is_asked(targets).all()
    assert padding_mask(targets) is None
    assert not is_asked(torch.full((2, 2), IGNORE)).any()
    assert num_targets(TensorDataset(torch.zeros(2, 4), targets)) == 2


def test_an_answer_of_another_shape_is_no_answer() -> None:
    scoring, one = scoring_of(numbers()), torch.zeros(9)
    for ask in (scoring.task_loss, scoring.losses, scoring.score):
        with pytest.raises(InputError, match=r"answers \[9\] for targets of shape \[9, 1\]"):
            ask(one, torch.zeros(9, 1))  # would broadcast to (9, 9)


def test_scores_of_which_kinds_are_losses() -> None:
    assert [kind for kind in UNITS if is_loss(kind)] == ["language", "regression"]


def final(folder: Path) -> dict[str, Any]:
    """Everything at the end that is no time of the day."""
    state = checkpoint.newest(folder / "checkpoints")
    assert state is not None
    del state["cost"]["clock"]
    return state


def errors(state: dict[str, Any], stream: Stream) -> np.ndarray:
    """(T,) mean squared errors of a dense model's weights, by numpy in float64."""
    weights = {name: value.double().numpy() for name, value in state["learner"]["model"].items()}

    def through(name: str, x: np.ndarray) -> np.ndarray:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    found = []
    for experience in stream:
        inputs, targets = (tensor.double().numpy() for tensor in experience.test.tensors)
        x = np.maximum(through("stem", inputs), 0)
        hidden = np.maximum(through("slot.linear_in", x), 0)
        answers = through("readout", x + through("slot.linear_out", hidden))
        found.append(((answers - targets) ** 2).mean())
    return np.array(found)


def test_the_matrix_is_minus_the_squared_error_and_forgetting_is_seen(tmp_path: Path) -> None:
    run = run_of(tmp_path, stream=numbers(targets=2), measuring=Measuring(every=4))
    value = run_experiment(run)
    scores = artifacts.read_matrix(tmp_path / artifacts.MATRIX).scores.numpy()
    for i in range(4):
        (file,) = (tmp_path / "checkpoints").glob(f"boundary_{i:03d}-*.pt")
        state = torch.load(file, weights_only=True)
        np.testing.assert_allclose(scores[i], -errors(state, run.stream), rtol=1e-5)
    points = names.all_points(run.measured, 3)
    assert value == pytest.approx(scores[-1].mean())
    assert points["stream/average_loss"] == pytest.approx(-scores[-1].mean())
    assert points["loss/experience_01"] == pytest.approx(-scores[3, 1])
    learnt = -scores[[1, 2, 3], [0, 1, 2]]
    assert points["stream/learning_loss"] == pytest.approx(learnt.mean())
    assert (learnt < -scores[0]).all()
    assert points["stream/forgetting"] > 0.5
    assert points["forgetting/experience_00"] == pytest.approx(scores[1:3, 0].max() - scores[3, 0])
    assert points["stream/online_loss"] > points["stream/learning_loss"]
    assert points["stream/max_loss"] >= -scores[2:, :2].max()
    assert math.isfinite(points["plasticity/effective_rank"])
    said = " ".join(points)
    assert not any(word in said for word in ("accuracy", "perplexity", "calibration"))
    assert sum(len(steps) for steps, _ in run.measured.anytime.values()) == 3 * 2
    assert run.cost.tokens == 3 * 2 * 40 * 2


def test_what_is_printed_names_squared_errors(tmp_path: Path) -> None:
    from rich.console import Console

    run = run_of(tmp_path)
    run_experiment(run)
    console = Console(width=90)
    with console.capture() as said:
        console.print(table.run_table(run.measured, {}))
        console.print(table.boundary_line(run.measured, 2))
    assert "Loss (squared error) after 3 of 3 experiences" in said.get()
    loss = -run.measured.rows[2][1].item()
    assert f"2/3 map 1: loss {loss:.3f}" in said.get()
    assert "nats per token" not in said.get()


@pytest.mark.parametrize("strategy", [Cumulative, Joint, Replay])
def test_seeing_the_past_again_forgets_less(strategy: Callable, tmp_path: Path) -> None:
    forgotten = {}
    for name, strategies in {"naive": {}, "other": {strategy.__name__.lower(): strategy()}}.items():
        run = run_of(tmp_path / name, strategies)
        run_experiment(run)
        forgotten[name] = names.stream_points(run.measured, 3)["stream/forgetting"]
    assert forgotten["other"] < forgotten["naive"] / 2


GROWN: dict[str, dict[str, Any]] = {
    "moe": {"layer": "moe", "growth": EveryExperience(2), "freeze": PastExperts()},
    "peer": {"layer": "peer", "growth": EveryExperience(4), "freeze": PastExperts()},
    "frozen": {"layer": "moe", "growth": EveryExperience(2), "freeze": AllPast()},
    "drift": {"layer": "moe", "growth": OnDrift(2, samples=16, level=0.2, effect=0.5)},
    "plateau": {"layer": "moe", "growth": OnPlateau(2, patience=1, improvement=10.0)},
    "saturation": {"layer": "moe", "growth": OnSaturation(2, measure="usage", threshold=0.1)},
}


@pytest.mark.parametrize("name", GROWN)
def test_growth_and_the_parts_of_forgetting_need_no_classes(name: str, tmp_path: Path) -> None:
    run = run_of(tmp_path, measuring=Measuring("always"), **GROWN[name])
    run_experiment(run)
    points, ledger = names.all_points(run.measured, 3), run.learner.ledger
    assert [event for event in ledger if event["act"] == "grow"]
    assert not [event for event in ledger if event["act"] == "head"]
    assert run.learner.model.head.classes == []
    parts = points["stream/forgetting_weights"] + points["stream/forgetting_routing"]
    assert parts == pytest.approx(-points["stream/backward_transfer"], abs=1e-9)
    if name == "frozen":
        assert points["stream/forgetting_weights"] == 0


def test_a_readout_outside_the_head_is_as_good(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = Numbers((4,), 0, "moe", in_head=False)
    run = run_of(tmp_path, model=model, growth=EveryExperience(2), measuring=Measuring("always"))
    run_experiment(run)
    points = names.all_points(run.measured, 3)
    assert points["stream/learning_loss"] < -run.measured.rows[0].mean().item()
    assert "stream/forgetting_weights" in points
    assert "plasticity/effective_rank" not in points, "nobody reads by the head"


def test_a_plateau_is_told_by_squared_errors(tmp_path: Path) -> None:
    run = run_of(tmp_path, layer="moe", growth=OnPlateau(2, patience=1, improvement=10.0, target=1e9))
    run_experiment(run)
    means = run.learner.trace.means
    assert len(means) == 3
    assert all(0 < mean < 100 for mean in means)
    assert not [event for event in run.learner.ledger if event["act"] == "grow"], "all are below the target"


@pytest.mark.parametrize("layer", LAYERS)
def test_interrupted_equals_uninterrupted(layer: str, tmp_path: Path, monkeypatch) -> None:
    def make(folder: Path) -> Run:
        growth = None if layer == "dense" else EveryExperience(4)
        return run_of(folder, {"replay": Replay(20)}, layer, growth=growth, every_steps=1)

    copies, save = [], checkpoint.Checkpoints.save

    def copying(self: Any, saved_in: Path, moment: Any, *rest: Any) -> Path:
        written = save(self, saved_in, moment, *rest)
        (tmp_path / "copies").mkdir(exist_ok=True)
        copies.append(Path(shutil.copy(written, tmp_path / "copies")))
        return written

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Checkpoints, "save", copying)
        run_experiment(make(tmp_path / "through"))
    inside = [copy for copy in copies if copy.name.startswith("boundary_001_batch")]
    assert len(inside) == 2 * 5 - 1, "the last step is the boundary's"
    for copy in (inside[0], inside[6]):
        folder = tmp_path / copy.stem
        (folder / "checkpoints").mkdir(parents=True)
        shutil.copy(copy, folder / "checkpoints")
        run_experiment(make(folder))
        assert differences(final(folder), final(tmp_path / "through")) == []
        for name in (artifacts.MATRIX, artifacts.LEDGER):
            assert (folder / name).read_bytes() == (tmp_path / "through" / name).read_bytes()


def spoilt(stream: Stream, targets: torch.Tensor) -> Stream:
    first = replace(stream[0], test=TensorDataset(stream[0].test.tensors[0], targets))
    return replace(stream, experiences=(first, *stream[1:]))


@pytest.mark.parametrize(
    ("stream", "word"),
    [
        (replace(numbers(), scenario="class"), "stream.scenario"),
        (replace(numbers(), num_classes=2), "stream.scenario"),
        (replace(numbers(), experiences=(replace(numbers()[0], classes=(1,)),)), "stream.scenario"),
        (spoilt(numbers(), torch.full((30, 1), math.nan)), "not finite"),
        (spoilt(numbers(), torch.zeros(30, 1).long()), "not finite"),
        (spoilt(numbers(), torch.zeros(30)), r"answers \[2, 1\] for targets of shape \[2\]"),
    ],
    ids=["scenario", "classes", "classes that occur", "NaN", "whole numbers", "shape"],
)
def test_what_is_no_regression_is_refused_before_it_begins(stream: Stream, word: str) -> None:
    model = Numbers((4,), 0)
    preflight.check_fit(numbers(), model, 1, {})
    with pytest.raises(InputError, match=word):
        preflight.check_fit(stream, model, 1, {})
    assert model.training, "a look leaves the model as it was"


def test_a_model_of_another_kind_is_refused(composed: Callable[..., DictConfig], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a model for classification on stream maps"):
        Learner(MLPClassifier((4,), 0, LAYERS["dense"]), SGD(lr=0.1), {}, numbers())
    run = launch.build(composed("tracking=none", f"output_dir={tmp_path}"))
    assert run.tags["kind"] == "classification"
    with pytest.raises(InputError, match="a model for regression on stream split_digits"):
        Learner(Numbers((64,), 0), SGD(lr=0.1), {}, run.stream)


def test_a_stream_of_numbers_is_cut_like_any_other(tmp_path: Path) -> None:
    run = run_of(tmp_path, stream=cut(numbers(), 2, 0))
    run_experiment(run)
    assert run.measured.matrix.shape == (7, 6)
    assert torch.equal(run.measured.matrix[:, 0], run.measured.matrix[:, 1])
