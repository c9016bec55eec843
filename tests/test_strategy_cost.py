"""What each strategy takes beside plain training, in operations, against its definition by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig

from cl_moe import launch
from cl_moe.experiment import run_experiment
from cl_moe.run import Run

BATCH, WIDTH = 64, 16
SMALL = (
    *("tracking=none", "stream.tune_on_first=2", "trainer.epochs=2", f"trainer.batch_size={BATCH}"),
    *("trainer.eval_batch_size=512", f"model.width={WIDTH}", "eval.decomposition=never"),
)
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_drawing")]


def products(columns: int) -> int:
    """Multiplications of one example in 64 -> 16 -> 16 -> columns."""
    return 64 * WIDTH + WIDTH * WIDTH + WIDTH * columns


def _backed(columns: int) -> int:
    """Operations of an example's forward and backward pass."""
    return 2 * (3 * products(columns) - 64 * WIDTH)


def _memory_steps(run: Run) -> int:
    """Steps of the second experience."""
    return 2 * -(-len(run.stream[1].train) // BATCH)


def _extra(run: Run, name: str) -> int:
    """What a strategy takes beside plain training on its own stream, by its definition."""
    num = [len(experience.train) for experience in run.training_stream]
    asked = sum(2 * n * products(c) for n, c in zip(num, (2, 4), strict=True))  # a forward pass of all data
    match name:
        case "ewc" | "mas":  # each example's gradient, once
            return sum(n * _backed(c) for n, c in zip(num, (2, 4), strict=True))
        case "agem":
            return _memory_steps(run) * 64 * _backed(4)
        case "der":  # two passes of as many kept examples, from the second step on
            return 2 * (2 * num[0] - BATCH) * _backed(2) + 2 * 2 * num[1] * _backed(4)
        case "latent_replay":  # the upper part of as many kept rows; a stem for one; activations at the end
            upper = WIDTH * WIDTH + WIDTH * 4
            kept = 2 * num[1] * 2 * (3 * upper - WIDTH * WIDTH)
            return kept + _memory_steps(run) * 2 * 64 * WIDTH + asked + 2 * products(4)
        case "replay":  # by herding: features at each end, and twice the examples in the second
            return asked + 2 * num[1] * _backed(4)
        case "bic":  # the held-out examples once, to fit the correction
            kept = run.learner.strategies["bic"].memory.values()  # type: ignore[attr-defined]
            return 2 * sum(map(len, kept)) * products(4)
        case "icarl":  # exemplars, a teacher, features of all, and those of exemplars for the means
            shown = run.learner.charges.examples - 2 * num[0]
            means = 2 * 200 * (products(2) + products(4))
            return (shown - 2 * num[1]) * _backed(4) + 2 * shown * products(4) + asked + means
    return 0


CHARGED = (
    "ewc",
    "mas",
    "si",
    "agem",
    "der",
    "latent_replay",
    "replay",
    "bic",
    "icarl",
    "cumulative",
    "gdumb",
)
FREE = ("weight_aligning", "rewarming", "shrink_perturb", "continual_backprop")


@pytest.mark.parametrize("name", [*CHARGED, *FREE])
def test_what_a_strategy_takes_by_hand(
    name: str, composed: Callable[..., DictConfig], tmp_path: Path
) -> None:
    policy = ("strategy.replay.policy=herding",) if name == "replay" else ()
    run = launch.build(composed(*SMALL, f"strategy={name}", *policy, f"output_dir={tmp_path / 'out'}"))
    run_experiment(run)
    own = [2 * len(experience.train) for experience in run.training_stream]
    plain = sum(num * _backed(c) for num, c in zip(own, (2, 4), strict=True))
    fitting = run.cost.points()["cost/train_flops"] - plain - _extra(run, name)
    assert 0 <= fitting <= (2000 if name == "bic" else 0), "L-BFGS multiplies vectors of two numbers"
