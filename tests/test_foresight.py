"""The look at an experience's first batches: which examples, under which model, at whose cost; no trace."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.data import TensorDataset

from cl_moe import experiment, foresight, launch
from cl_moe.growth import Census, Trace
from cl_moe.run import Run
from cl_moe.stream import Stream

SMALL = (
    *("tracking=none", "model.width=16", "trainer.epochs=2", "trainer.eval_batch_size=50", "eval.samples=0"),
    *(
        "layer=moe",
        "layer.hidden=8",
        "layer.num_experts=4",
        "growth.num_experts=2",
        "eval.decomposition=never",
    ),
)
DOMAINS = ("stream=permuted_digits", "stream.tune_on_first=2", "stream.cut=2", "stream.num_experiences=2")
pytestmark = pytest.mark.usefixtures("no_drawing")


@pytest.fixture
def build(composed: Callable[..., DictConfig], tmp_path: Path) -> Callable[..., Run]:
    def built(*words: str) -> Run:
        return launch.build(composed(*SMALL, *words, f"output_dir={tmp_path}"))

    return built


class Seen:
    """What every census held, what the first batch of every fit lost, and whether a look left a trace."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.censuses: list[Census] = []
        self.first_batches: list[Tensor] = []
        self.operations: list[int] = []
        look, add, note = foresight.census_of, Trace.add, foresight.tell_decision

        def looking(run: Run, e: object) -> Census:
            before, state = _bytes(run), torch.get_rng_state()
            self.operations.append(-run.learner.charges.flops["train"])
            self.censuses.append(look(run, e))  # type: ignore[arg-type]
            assert _bytes(run) == before
            assert torch.equal(torch.get_rng_state(), state)
            return self.censuses[-1]

        def adding(trace: Trace, losses: Tensor, routings: dict) -> None:
            if trace._batches == 0:
                self.first_batches.append(losses)
            add(trace, losses, routings)

        def noting(run: Run, e: object) -> bool:
            self.operations[-1] += run.learner.charges.flops["train"]
            return note(run, e)  # type: ignore[arg-type]

        patch.setattr(experiment, "census_of", looking)
        patch.setattr(experiment, "tell_decision", noting)
        patch.setattr(Trace, "add", adding)


def _bytes(run: Run) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in run.learner.model.state_dict().items()}


@pytest.mark.slow
def test_it_sees_the_very_examples_that_come_first(build, monkeypatch) -> None:
    seen, run = (
        Seen(monkeypatch),
        build(*DOMAINS, "growth=on_drift", "growth.samples=100", "growth.level=1e-9"),
    )
    experiment.run_experiment(run)
    assert [census.coming is None for census in seen.censuses] == [True, False, False, False]
    for index in (1, 3):  # where nothing was born, the first step begins with the same model
        coming, first = seen.censuses[index].coming, seen.first_batches[index]
        assert not [e for e in run.learner.ledger if e["act"] == "grow" and e["experience"] == index]
        assert coming is not None
        assert len(coming) == 100
        torch.testing.assert_close(coming[: len(first)], first, rtol=1e-4, atol=1e-5)
    assert seen.operations[0] == 0
    assert all(operations > 0 for operations in seen.operations[1:])


def test_a_drift_between_domains_is_found_and_said(build, monkeypatch) -> None:
    run = build(*DOMAINS, "growth=on_drift", "growth.samples=128", "optimizer.momentum=0.9")
    told: dict[tuple[str, int], float] = {}
    monkeypatch.setattr(
        run.tracker, "add", lambda points, step: told.update({(key, step): v for key, v in points.items()})
    )
    experiment.run_experiment(run)
    born = [e["experience"] for e in run.learner.ledger if e["act"] == "grow"]
    assert born == [2]
    notes = [
        event for event in json.loads((run.folder / "ledger.json").read_text()) if event["act"] == "decide"
    ]
    assert [note["experience"] for note in notes] == [1, 2, 3]
    for note in notes:
        at = note["experience"]
        assert told["growth/drift_statistic", at] == note["statistic"]
        assert told["growth/drift_effect", at] == note["effect"]
        assert (note["statistic"] <= note["threshold"] and note["effect"] >= 0.6) == (note["born"] > 0)


def test_classes_that_never_came_are_drift(build) -> None:
    run = build("stream.tune_on_first=2", "stream.cut=2", "growth=on_drift", "growth.samples=64")
    experiment.run_experiment(run)
    assert [e["experience"] for e in run.learner.ledger if e["act"] == "grow"] == [2]
    (note,) = [e for e in run.learner.ledger if e["act"] == "decide" and e["experience"] == 2]
    assert note["effect"] == 1.0
    assert math.isfinite(note["statistic"])


def test_language_is_judged_by_windows(build, monkeypatch) -> None:
    seen = Seen(monkeypatch)
    texts = ("stream=text_domains", "stream.train_bytes=4000", "stream.test_bytes=1000", "stream.context=32")
    run = build(*texts, "stream.tune_on_first=2", "growth=on_drift", "growth.samples=40", "growth.level=1e-9")
    experiment.run_experiment(run)
    coming, first = seen.censuses[1].coming, seen.first_batches[1]
    assert coming is not None
    torch.testing.assert_close(coming[: len(first)], first, rtol=1e-4, atol=1e-5)


def test_nobody_looks_where_no_schedule_asks(build, monkeypatch) -> None:
    seen, run = Seen(monkeypatch), build(*DOMAINS, "growth=every_k", "growth.k=2")
    experiment.run_experiment(run)
    assert seen.first_batches == []
    assert all(census.coming is None and census.reference is None for census in seen.censuses)
    assert [e["experience"] for e in run.learner.ledger if e["act"] == "grow"] == [2]


@pytest.mark.parametrize("layer", ["moe", pytest.param("peer", marks=pytest.mark.slow)])
def test_whom_to_copy_is_told_by_training_data_alone(layer: str, composed, tmp_path, monkeypatch) -> None:
    def learnt(blank: bool) -> dict[str, bytes]:
        create = launch.instantiate

        def made(node: DictConfig, *words: object) -> object:
            stream = create(node, *words)
            if not (blank and isinstance(stream, Stream)):
                return stream
            tests = [TensorDataset(torch.zeros_like(e.test.tensors[0]), e.test.tensors[1]) for e in stream]
            pairs = zip(stream, tests, strict=True)
            return replace(stream, experiences=tuple(replace(e, test=test) for e, test in pairs))

        sizes = ("layer.num_experts=16", "layer.k=2", "layer.heads=2", "growth.num_experts=4")
        sizes = (*SMALL[:5], "layer=peer", *sizes, SMALL[-1])
        words = sizes if layer == "peer" else SMALL
        grown = ("stream.tune_on_first=3", "growth=every_experience", "growth.init=copy")
        with monkeypatch.context() as patch:
            patch.setattr(launch, "instantiate", made)
            run = launch.build(composed(*words, *grown, f"output_dir={tmp_path / str(blank)}"))
        experiment.run_experiment(run)
        return _bytes(run)

    seen: list[set[int]] = []
    look = foresight.loads_in_training
    monkeypatch.setattr(foresight, "loads_in_training", lambda run, e: seen.append({e.index}) or look(run, e))
    assert learnt(blank=False) == learnt(blank=True)
    assert seen == [{0}, {1}] * 2
