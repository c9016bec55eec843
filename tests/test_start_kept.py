"""What a run was made with is kept from its start: in its folder and in MLflow, however it ends."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from cl_moe.learner import Learner
from cl_moe.tracking import provenance, tracker
from cl_moe.tracking.entries import File, Point, from_line

SMALL = ("trainer.epochs=1", "stream.tune_on_first=3", "model.width=16", "hydra.run.dir=out")
START = {"config.yaml", "command.yaml", "environment.txt", "data.json"}


pytestmark = pytest.mark.usefixtures("no_drawing")


def entries(folder: Path) -> list[Any]:
    return [from_line(line) for line in (folder / "outbox.jsonl").read_bytes().splitlines(keepends=True)]


def in_mlflow(folder: Path) -> set[str]:
    client = MlflowClient(f"sqlite:///{folder.parent}/mlflow.db")
    run_id = (folder / "mlflow_run_id").read_text().strip()
    return {file.path for file in client.list_artifacts(run_id)}


def fail_in(monkeypatch: pytest.MonkeyPatch, experience: int) -> None:
    original = Learner.training_step

    def failing(self: Learner, *words: Any) -> Any:
        if self.experience is not None and self.experience.index == experience:
            raise RuntimeError("no more")
        return original(self, *words)

    monkeypatch.setattr(Learner, "training_step", failing)


def test_a_run_that_failed_and_went_on_elsewhere(
    command: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        fail_in(patch, 1)
        assert command(*SMALL).status == 1
    assert in_mlflow(out) - {"git.diff"} == START
    before = (out / "environment.txt").read_bytes()
    assert json.loads((out / "data.json").read_text())["experiences"]

    environment = provenance.environment()
    changed = environment.replace("threads 1\n", "threads 7\n")
    assert changed != environment
    monkeypatch.setattr(provenance, "environment", lambda: changed)
    done = command("resume=out")
    assert done.status == 0, done.text
    said = "Resumed in another environment (threads was 1, is 7): see environment_resumed.txt."
    assert done.text.count(said) == 1
    assert (out / "environment.txt").read_bytes() == before
    assert (out / "environment_resumed.txt").read_text() == changed
    assert in_mlflow(out) >= START | {"environment_resumed.txt", "accuracy_matrix.csv"}
    sent = Counter(entry.artifact for entry in entries(out) if isinstance(entry, File))
    assert all(sent[name] == 1 for name in START)


@pytest.mark.slow
def test_one_that_fails_before_its_first_checkpoint_begins_again(
    command: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "test_step", lambda *words: 1 / 0)
        assert command(*SMALL).status == 1
    assert in_mlflow(tmp_path / "out") - {"git.diff"} == START
    assert command("resume=out").status == 0
    sent = Counter(entry.artifact for entry in entries(tmp_path / "out") if isinstance(entry, File))
    assert all(sent[name] == 1 for name in START)
    assert not (tmp_path / "out" / "environment_resumed.txt").exists()


def test_mlflow_need_not_answer(command: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def away(*words: object) -> None:
        raise RuntimeError("away")

    monkeypatch.setattr(tracker.MLflowTracker, "start", away)
    assert command(*SMALL).status == 1
    assert {path.name for path in (tmp_path / "out").iterdir()} >= START


@pytest.mark.slow
def test_a_branch_has_its_parents_curves_inside_experiences(command: Callable, tmp_path: Path):
    assert command(*SMALL, "eval.every=2", "eval.samples=20").status == 0
    assert command("branch=out@2", "hydra.run.dir=child").status == 0

    def inside(folder: Path) -> Counter[tuple[str, int, float]]:
        found = (entry for entry in entries(folder) if isinstance(entry, Point))
        return Counter((p.metric, p.step, p.value) for p in found if p.metric.startswith("anytime_"))

    parents = inside(tmp_path / "out")
    assert inside(tmp_path / "child") == parents
    assert max(parents.values()) == 1
    assert len({key for key, _, _ in parents}) == 3
