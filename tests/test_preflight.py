"""What is refused before any training, and what a checkpoint must share with the run that loads it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig

from cl_moe import launch, preflight
from cl_moe.errors import InputError
from cl_moe.run import Run

SMALL = ("tracking=none", "stream.tune_on_first=3", "model.width=8")


@pytest.fixture
def build(composed: Callable[..., DictConfig], tmp_path: Path) -> Callable[..., Run]:
    def built(name: str, *words: str) -> Run:
        return launch.build(composed(*SMALL, *words, f"output_dir={tmp_path / name}"))

    return built


def test_a_fingerprint_knows_the_stream_its_data_and_the_models_shape(build: Callable[..., Run]):
    one, same = build("one"), build("same", "seed.init=1", "strategy=replay", "optimizer.lr=0.5")
    assert one.fingerprint == same.fingerprint
    assert build("wider", "model.width=16").fingerprint["model"] != one.fingerprint["model"]
    assert build("other", "seed.order=3").fingerprint["stream"] != one.fingerprint["stream"]
    for part in ("train", "test"):
        getattr(one.stream[1], part).tensors[0].view(-1)[5] += 1e-3
        changed = preflight.fingerprint(one.stream, one.learner)
        assert changed["stream"] != one.fingerprint["stream"]
        assert changed["model"] == one.fingerprint["model"]
        one.fingerprint = changed


def test_a_checkpoint_of_other_data_is_refused(build: Callable[..., Run]):
    run = build("run")
    assert run.refuse({"fingerprint": run.fingerprint}) is None
    for theirs in ({}, {**run.fingerprint, "stream": ["split_digits"]}):
        assert "another stream, or of other data" in (run.refuse({"fingerprint": theirs}) or "")
    other = {**run.fingerprint, "model": {}}
    assert "another model" in (run.refuse({"fingerprint": other}) or "")


@pytest.mark.parametrize(("strategy", "boundary", "left"), [("naive", 2, True), ("naive", 3, False)])
def test_a_branch_needs_something_to_train_on(strategy, boundary, left, build: Callable[..., Run]):
    training = build("run", f"strategy={strategy}").training_stream
    if left:
        preflight.check_something_left(training, boundary)
        return
    with pytest.raises(InputError, match="nothing left to train on"):
        preflight.check_something_left(training, boundary)


def test_joint_training_cannot_begin_at_a_branch(build: Callable[..., Run]):
    training = build("run", "strategy=joint").training_stream
    preflight.check_something_left(training, 0)
    with pytest.raises(InputError):
        preflight.check_something_left(training, 1)


def test_nan_in_a_fingerprint_is_equal_to_itself(build: Callable[..., Run]):
    run = build("run")
    run.stream[0].train.tensors[0][0, 0] = torch.nan
    assert preflight.fingerprint(run.stream, run.learner) == preflight.fingerprint(run.stream, run.learner)
