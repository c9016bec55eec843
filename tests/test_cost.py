"""What a run says it cost, against formulas by hand; counting changes nothing and is never done twice."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from cl_moe import checkpoint, launch, stopping
from cl_moe.counting import charges
from cl_moe.errors import StopRequestedError
from cl_moe.experiment import run_experiment
from cl_moe.learner import Learner
from cl_moe.run import Run
from cl_moe.strategies.der import DER
from cl_moe.strategies.naive import Naive
from cl_moe.tracking import artifacts

CONF = Path(__file__).parents[1] / "conf"
MIB = 2**20
BATCH, WIDTH = 64, 16
SMALL = (
    *("tracking=none", "stream.tune_on_first=2", "trainer.epochs=2", f"trainer.batch_size={BATCH}"),
    *("trainer.eval_batch_size=512", f"model.width={WIDTH}", "eval.decomposition=never"),
)
MOE = ("layer=moe", "layer.hidden=8", "layer.num_experts=4")
GROW = ("growth=every_experience", "growth.num_experts=4", "freeze=past_experts")
VARYING = (*MOE, *GROW, "router=switch", "strategy=[replay,lwf]", "optimizer=adamw", "trainer.batch_size=16")


pytestmark = pytest.mark.usefixtures("no_drawing")


@pytest.fixture
def run_of(composed: Callable[..., DictConfig], tmp_path: Path) -> Callable[..., Run]:
    """``run_of("layer=moe", ...)`` is a run that has ended."""

    def ran(*words: str, name: str = "out") -> Run:
        run = launch.build(composed(*SMALL, *words, f"output_dir={tmp_path / name}"))
        run_experiment(run)
        return run

    return ran


def products(columns: int) -> int:
    """Multiplications of one example in 64 -> 16 -> 16 -> columns."""
    return 64 * WIDTH + WIDTH * WIDTH + WIDTH * columns


def examples(run: Run, epochs: int = 2) -> list[int]:
    """Examples trained in each experience."""
    return [epochs * len(experience.train) for experience in run.stream]


def by_hand(run: Run, columns: tuple[int, int] = (2, 4)) -> int:
    """Forward and backward passes of plain training; the first layer's input asks for no gradient."""
    return sum(
        2 * num * (3 * products(c) - 64 * WIDTH) for num, c in zip(examples(run), columns, strict=True)
    )


def test_plain_training_by_hand(run_of: Callable):
    run = run_of()
    points = run.cost.points()
    assert points["cost/train_flops"] == by_hand(run)
    tests = sum(len(experience.test) for experience in run.stream)
    # The row before training has a model without classes, and no head to compute.
    assert points["cost/eval_flops"] == sum(2 * tests * products(c) for c in (0, 2, 4))
    assert points["cost/inference_flops_per_token"] == 2 * products(4)
    assert points["cost/examples_seen"] == sum(examples(run)) == run.cost.tokens


@pytest.mark.parametrize(
    "words",
    [("trainer.accumulate=3",), ("trainer.precision=bf16-mixed",), ("optimizer=adamw",), ("stream.cut=2",)],
)
def test_what_takes_no_other_products(words: tuple[str, ...], run_of: Callable):
    run = run_of(*words)
    columns = (2, 2, 4, 4) if "stream.cut=2" in words else (2, 4)
    assert run.cost.points()["cost/train_flops"] == by_hand(run, columns)


def test_joint_training_is_charged_once(run_of: Callable):
    run = run_of("strategy=joint")
    per_example = 2 * (3 * products(4) - 64 * WIDTH)
    assert run.cost.points()["cost/train_flops"] == sum(examples(run)) * per_example


def test_a_teachers_passes_are_charged(run_of: Callable):
    run = run_of("strategy=lwf")
    teacher = 2 * examples(run)[1] * products(4)
    assert run.cost.points()["cost/train_flops"] == by_hand(run) + teacher


def test_replayed_examples_are_charged(run_of: Callable):
    run = run_of("strategy=replay", "strategy.replay.share=0.5")
    points, (first, second) = run.cost.points(), examples(run)
    assert points["cost/examples_seen"] == first + 2 * second
    assert run.cost.tokens == first + second
    per_example = [2 * (3 * products(c) - 64 * WIDTH) for c in (2, 4)]
    assert points["cost/train_flops"] == first * per_example[0] + 2 * second * per_example[1]


def test_frozen_cohorts_are_cheaper(run_of: Callable):
    live = run_of(*MOE, *GROW[:-1], name="live").cost.points()
    frozen = run_of(*MOE, *GROW, name="frozen").cost.points()
    assert frozen["cost/train_flops"] < live["cost/train_flops"]
    assert frozen["cost/params_trainable"] < live["cost/params_trainable"]
    for key in ("params_total", "params_active", "param_bytes", "inference_flops_per_token"):
        assert frozen[f"cost/{key}"] == live[f"cost/{key}"], key


def test_steps_beside_frozen_cohorts_are_counted_anew(run_of: Callable, monkeypatch: pytest.MonkeyPatch):
    """How many tokens go to live experts, whose weights have gradients, changes from step to step."""
    asked: list[tuple[str, bool]] = []
    forget = charges.Charges.forget

    def noting(self: charges.Charges, varies: bool, model: int | None = None) -> None:
        asked.append((self._account, varies))
        forget(self, varies, model)

    monkeypatch.setattr(charges.Charges, "forget", noting)
    run_of(*MOE, *GROW)
    assert [varies for account, varies in asked if account == "train"] == [False, True]
    assert {varies for account, varies in asked if account != "train"} == {False}


def test_bytes_and_parameters(run_of: Callable):
    run = run_of("optimizer=adamw", "strategy=[replay,lwf]", "strategy.replay.memory_size=50")
    points, model = run.cost.points(), run.learner.model
    total = 64 * WIDTH + WIDTH + WIDTH * WIDTH + WIDTH + WIDTH * 4 + 4
    assert points["cost/params_total"] == points["cost/params_active"] == total
    assert points["cost/param_bytes"] == 4 * total
    tensors = len(list(model.parameters()))
    assert points["cost/optimizer_bytes"] == 2 * 4 * total + 4 * tensors  # two moments, and a step for each
    memory = 50 * (64 * 4 + 8)
    assert points["cost/buffer_bytes"] == memory + 4 * total


def final(run: Run) -> dict[str, Any]:
    state = checkpoint.newest(run.saved_in)
    assert state is not None
    del state["cost"]["clock"]
    return state


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@contextmanager
def _uncounted() -> Iterator[SimpleNamespace]:
    yield SimpleNamespace(total=0)


@pytest.mark.parametrize("words", [VARYING, ("layer=peer", "layer.num_experts=16", "layer.k=2", *GROW[2:])])
def test_counting_changes_no_bit(words: tuple[str, ...], run_of: Callable, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(charges, "EVERY", 3)
    counted = final(run_of(*words, name="counted"))
    assert counted.pop("cost")["charges"]["flops"]["train"] > 0
    monkeypatch.setattr(charges, "CountFlops", _uncounted)
    plain = final(run_of(*words, name="plain"))
    assert plain.pop("cost")["charges"]["flops"]["train"] == 0
    assert same(plain, counted)


def test_a_run_stopped_while_it_is_measured_is_charged_once(
    run_of: Callable, monkeypatch: pytest.MonkeyPatch
):
    through = final(run_of(*VARYING, name="through"))
    original, tests = Learner.test_step, []

    def stopping_in_the_second_row(self: Learner, *arguments: Any) -> None:
        tests.append(self.global_step)
        if len(set(tests)) == 2:
            monkeypatch.setattr(stopping, "_noted", signal.SIGTERM)
        original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "test_step", stopping_in_the_second_row)
        with pytest.raises(StopRequestedError):
            run_of(*VARYING, name="stopped")
    monkeypatch.setattr(stopping, "_noted", None)
    resumed = run_of(*VARYING, name="stopped")
    assert len(set(tests)) == 2
    assert same(final(resumed)["cost"], through["cost"])
    assert (resumed.folder / artifacts.MATRIX).exists()


@pytest.mark.slow
def test_a_runs_peak_is_its_own(run_of: Callable, monkeypatch: pytest.MonkeyPatch):
    def greedy(self: Naive, outlook: object) -> None:
        torch.ones(200 * MIB // 4)

    before = run_of(name="before").cost.points()["cost/peak_memory_bytes"]
    with monkeypatch.context() as patch:
        patch.setattr(Naive, "begin", greedy)
        large = run_of(name="large").cost.points()["cost/peak_memory_bytes"]
    after = run_of(name="after").cost.points()["cost/peak_memory_bytes"]
    assert 150 * MIB < large - before < 250 * MIB
    assert after < 100 * MIB
    # over all its processes, as far as a checkpoint saw: the last one is written before the run's end
    again = run_of(name="large").cost.points()["cost/peak_memory_bytes"]
    assert 150 * MIB < again - before < 250 * MIB


def fixed_strategies() -> list[str]:
    """Of every YAML whose class says that its terms take the same for batches of the same shapes."""
    targets = {path.stem: OmegaConf.load(path) for path in sorted((CONF / "strategy").glob("*.yaml"))}
    classes = {name: get_class(leaf["_target_"]) for name, leaf in targets.items()}
    return [name for name, found in classes.items() if not found.cost_varies]


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("ewc", "lifelong_moe") else pytest.param(name, marks=pytest.mark.slow)
        for name in fixed_strategies()
    ],
)
def test_terms_that_do_not_vary_cost_as_if_every_step_were_counted(
    name: str, run_of: Callable, monkeypatch: pytest.MonkeyPatch
):
    words = (f"strategy={name}", *(MOE + GROW[:-1] if name == "lifelong_moe" else ()))
    words += (f"strategy.{name}.samples=8",) if name in ("ewc", "mas") else ()
    quick = run_of(*words, name="quick").cost.points()["cost/train_flops"]
    monkeypatch.setattr(charges.Charges, "_is_due", lambda *words: True)
    assert run_of(*words, name="counted").cost.points()["cost/train_flops"] == quick > 0


def test_a_class_that_claims_wrongly_is_found_out(run_of: Callable, monkeypatch: pytest.MonkeyPatch):
    """Shown a strategy whose terms vary and that says they do not."""
    monkeypatch.setattr(DER, "cost_varies", False)
    quick = run_of("strategy=der", name="quick").cost.points()["cost/train_flops"]
    monkeypatch.setattr(charges.Charges, "_is_due", lambda *words: True)
    assert run_of("strategy=der", name="counted").cost.points()["cost/train_flops"] != quick
