"""A number that is none ends the run with its name, wherever it appears; it is no wrong answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from torch import Tensor

from cl_moe.layers import MoE
from cl_moe.learner import Learner
from cl_moe.models import DecoderLM, MLPClassifier
from cl_moe.tracking import artifacts

SMALL = ("trainer.epochs=1", "stream.tune_on_first=2", "hydra.run.dir=out")
TEXT = ("stream=text_domains", "stream.train_bytes=6000", "stream.test_bytes=2000", "stream.context=32")
PEER = ("layer=peer", "layer.num_experts=64", "layer.k=4")
NAN, INF = float("nan"), float("inf")
MODELS: dict[str, tuple[type, tuple[str, ...]]] = {
    "classification": (MLPClassifier, SMALL),
    "experts": (MLPClassifier, (*SMALL, "layer=moe")),
    "language": (DecoderLM, (*SMALL, *TEXT)),
}


pytestmark = pytest.mark.usefixtures("no_drawing")


def check(done: object, folder: Path, words: str) -> None:
    assert done.status == 1, done.text
    assert words in done.text
    assert "change: " in done.text
    assert "kept: the state after experience 0 of 2" in done.text
    assert "Traceback" not in done.text
    assert "defect" not in done.text
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert (run.info.status, run.data.tags["status"]) == ("FAILED", "failed")
    assert words in run.data.tags["failure"]
    assert not (folder / "out" / artifacts.MATRIX).exists()


@pytest.mark.parametrize("value", [NAN, *(pytest.param(x, marks=pytest.mark.slow) for x in (INF, -INF))])
@pytest.mark.parametrize(
    "kind", ["experts", pytest.param("classification", marks=pytest.mark.slow), "language"]
)
def test_an_output_that_is_not_finite_is_not_scored(
    kind: str, value: float, command: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One number in one row of an evaluation after training, where the loss of every step was fine."""
    cls, words = MODELS[kind]
    forward, tested = cls.forward, Learner.on_test_start

    def broken(self: torch.nn.Module, *args: object, **kwargs: object) -> tuple[Tensor, object]:
        logits, routings = forward(self, *args, **kwargs)
        if not self.training and getattr(self, "learnt", False):
            logits = logits.clone()
            logits.view(-1)[-1] = value
        return logits, routings

    def note(self: Learner) -> None:
        self.model.learnt = self.global_step > 0
        tested(self)

    monkeypatch.setattr(cls, "forward", broken)
    monkeypatch.setattr(Learner, "on_test_start", note)
    check(command(*words), tmp_path, "output not finite in an evaluation")


@pytest.mark.parametrize("where", ["parameters", "buffers"])
def test_weights_and_statistics_at_the_end_of_training(
    where: str, command: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = Learner.on_train_end

    @torch.no_grad()
    def broken(self: Learner) -> None:
        floats = [t for t in getattr(self.model, where)() if t.is_floating_point()]
        floats[-1].view(-1)[0] = INF
        ended(self)

    monkeypatch.setattr(Learner, "on_train_end", broken)
    check(command(*SMALL, *PEER), tmp_path, "not finite after step")


def test_an_auxiliary_loss_is_named(
    command: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = MoE.forward

    def broken(self: MoE, *args: object, **kwargs: object) -> tuple[Tensor, object]:
        out, routing = forward(self, *args, **kwargs)
        return out, routing._replace(losses={**routing.losses, "router_z": torch.tensor(NAN)})

    monkeypatch.setattr(MoE, "forward", broken)
    done = command(*SMALL, "layer=moe", "router=switch")
    check(done, tmp_path, "loss not finite at step 0: task_loss ")
    assert "router_z nan" in done.text
