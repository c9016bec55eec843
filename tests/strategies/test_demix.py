"""Experts of a domain: the own cohort learns, the own task answers, a text tells its domain itself."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cl_moe import launch
from cl_moe.errors import InputError
from cl_moe.experiment import run_experiment
from cl_moe.growth import EveryExperience
from cl_moe.layers import MoE, TopK
from cl_moe.layers.routing import fold_load
from cl_moe.models import DecoderLM
from cl_moe.seeds import seeded
from cl_moe.strategies import DEMix, Replay
from cl_moe.strategies.demix import posterior

GROW = EveryExperience(4, init="copy", noise=0.1)


def test_only_the_own_cohort_learns_and_the_own_task_answers(walk, new_model, new_stream) -> None:
    strategy, before = DEMix(), dict[str, Tensor]()
    for moment, learner in walk(new_model("moe"), new_stream("task"), {"demix": strategy}, GROW):
        state, index = learner.model.state_dict(), learner.experience.index
        if moment == "adapted":
            before = {name: value.clone() for name, value in state.items()}
            continue
        moved = {name for name, value in state.items() if not torch.equal(value, before[name])}
        cohorts = {name.split(".")[3] for name in moved if name.startswith("blocks.0.cohorts.")}
        assert cohorts == {str(index)}
        assert "stem.weight" in moved
        inputs, model = torch.randn(5, 6), learner.model.eval()

        def forward(cohorts, model=model, inputs=inputs):
            return model(inputs, cohorts=cohorts)

        for task in range(3):
            own = [task] if task <= index else [index]
            answer, routings = strategy.answer(forward, inputs, torch.full((5,), task))
            torch.testing.assert_close(answer, model(inputs, cohorts=own)[0])
            assert set((routings[0].expert // 4).flatten().tolist()) == set(own)
        mixed, _ = strategy.answer(forward, inputs, torch.tensor([0, index, 0, index, 0]))
        torch.testing.assert_close(mixed[1], model(inputs, cohorts=[index])[0][1])
        torch.testing.assert_close(mixed[2], model(inputs, cohorts=[0])[0][2])
        model.train()


def test_a_text_is_answered_by_the_posterior_of_its_domains() -> None:
    with seeded(0, "init"):
        layer = partial(MoE, num_experts=1, hidden=8, router=partial(TopK, k=1))
        model = DecoderLM((5,), 7, layer, width=8, num_blocks=2).eval()
        for block in model.expert_layers.values():
            block.grow(1, init="fresh")
            block.grow(1, init="fresh")
    strategy, inputs = DEMix(), torch.randint(7, (2, 5))
    strategy.load_state_dict({"groups": [-1, -1, -1]})
    with torch.no_grad():
        answers = [model(inputs, cohorts=[j])[0].softmax(-1) for j in range(3)]
        logits, routings = strategy.answer(lambda c: model(inputs, cohorts=c), inputs, None)
    share = torch.zeros(2, 5, 3)
    for row in range(2):
        for position in range(5):
            likely = torch.ones(3)
            for s in range(position):
                likely *= torch.stack([answers[j][row, s, inputs[row, s + 1]] for j in range(3)])
            share[row, position] = likely / likely.sum()
            mixed = sum(share[row, position, j] * answers[j][row, position] for j in range(3))
            torch.testing.assert_close(logits[row, position].exp(), mixed, rtol=1e-4, atol=1e-6)
    assert (share[:, 0] == 1 / 3).all()
    for routing in routings.values():
        load = fold_load(routing)
        torch.testing.assert_close(load.score, share.sum((0, 1)).double(), rtol=1e-4, atol=1e-5)
        assert load.count.tolist() == [10, 10, 10]


def test_the_posterior_hears_of_no_later_token() -> None:
    logs, tokens = torch.randn(2, 1, 6, 4).log_softmax(-1), torch.randint(4, (1, 6))
    changed = tokens.clone()
    changed[0, 4:] = (changed[0, 4:] + 1) % 4
    same = posterior(logs, tokens)[:, :, :4], posterior(logs, changed)[:, :, :4]
    assert torch.equal(*same)


@pytest.mark.slow
def test_it_runs_on_text(composed, tmp_path: Path, no_drawing: None) -> None:
    words = (
        *("stream=text_domains", "stream.train_bytes=6000", "stream.test_bytes=2000", "stream.context=32"),
        *("model.width=16", "layer=moe", "layer.num_experts=1", "layer.hidden=16", "router.k=1"),
        *("growth=every_experience", "growth.num_experts=1", "strategy=demix", "tracking=none"),
        "eval.decomposition=always",
    )
    run = launch.build(composed(*words, f"output_dir={tmp_path}"))
    run_experiment(run)
    assert run.measured.matrix.isfinite().all()
    assert (run.measured.matrix[1:] > run.measured.matrix[0]).all()
    assert run.learner.strategies["demix"].groups == [-1] * len(run.stream)


def test_what_it_cannot_serve_is_refused(train, new_model, new_stream) -> None:
    for scenario in ("class", "domain"):
        with pytest.raises(InputError, match="withholds the domain"):
            train(new_model("moe"), new_stream(scenario), {"demix": DEMix()}, GROW)
    with pytest.raises(InputError, match="without experts"):
        train(new_model("dense"), new_stream("task"), {"demix": DEMix()})
    with pytest.raises(InputError, match="beside replay"):
        train(new_model("moe"), new_stream("task"), {"demix": DEMix(), "replay": Replay()}, GROW)
    with pytest.raises(InputError, match="1 cohorts for 2 experiences"):
        train(new_model("moe"), new_stream("task"), {"demix": DEMix()})
