"""Law 7: scores of class- and domain-incremental streams do not hear of task labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig

from cl_moe import launch
from cl_moe.experiment import run_experiment
from cl_moe.stream import Stream

pytestmark = pytest.mark.usefixtures("no_drawing")
WORDS = ("tracking=none", "trainer.epochs=1", "stream.tune_on_first=3", "model.width=16", "strategy=replay")


@pytest.mark.parametrize("scenario", ["class", "domain"])
def test_shuffled_task_labels_change_no_score(
    scenario: str, composed: Callable[..., DictConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def matrix(labels: tuple[int | None, ...]) -> torch.Tensor:
        config = composed(*WORDS, f"stream.scenario={scenario}", f"output_dir={tmp_path / str(labels[0])}")
        build = launch.instantiate

        def labelled(node: DictConfig, *words: object) -> object:
            made = build(node, *words)
            if not isinstance(made, Stream):
                return made
            pairs = zip(made, labels, strict=True)
            return replace(made, experiences=tuple(replace(e, task_label=label) for e, label in pairs))

        with monkeypatch.context() as patch:
            patch.setattr(launch, "instantiate", labelled)
            run = launch.build(config)
        assert [experience.task_label for experience in run.stream] == list(labels)
        run_experiment(run)
        return run.measured.matrix

    assert torch.equal(matrix((None, None, None)), matrix((2, 0, 1)))
