"""ZeRO's ranks learn what one process learns."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from cl_moe.engines import DeepSpeed
from cl_moe.errors import InputError
from cl_moe.run import Run
from cl_moe.trainer import TrainerSpec
from tests import company
from tests.test_ranks import ARMS, DIGITS, WITH_ALL, compare, stop_at
from tests.test_sharded import FSDP_ARMS

pytestmark = [
    pytest.mark.usefixtures("no_drawing"),
    pytest.mark.filterwarnings("ignore"),  # DeepSpeed uses what torch gives up
]
needed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="the extra deepspeed is absent"
)
CLOSE = 1e-5
"""In float32, and where an expert that nobody chose counts as one with a gradient of 0."""
ODD = ("layer=dense", "layer.hidden=17", "model.width=15", "stream.tune_on_first=1")  # 1,549 parameters
OTHERS = {
    "an odd number of parameters": (1, (*DIGITS, *ODD)),
    "lwf": (1, ARMS["lwf"]),
    "lifelong_moe": (3, ARMS["lifelong_moe"]),
    "icarl": (2, ARMS["icarl"]),
    "causal text, padded": (3, FSDP_ARMS["causal text, padded"]),
    "hidden words at depth": (3, FSDP_ARMS["hidden words at depth"]),
    "looked at inside an experience": (3, FSDP_ARMS["looked at inside an experience"]),
    # not adamw, which makes steps out of the rounding of gradients that are nearly 0
    "tables": (3, ("optimizer=sgd", *(word for word in FSDP_ARMS["tables"] if word != "optimizer=adamw"))),
}


def single(arm: tuple[str, ...]) -> tuple[str, ...]:
    """The arm in float32."""
    return tuple(word for word in arm if word != "trainer.precision=64-true")


def zero(stage: int, *words: str) -> tuple[str, ...]:
    return ("trainer=deepspeed", f"trainer.engine.stage={stage}", *words)


@needed
@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_three_grown_experiences_end_as_with_one_process(composed, tmp_path, stage):
    alone = compare(composed, tmp_path, single(WITH_ALL), zero(stage), CLOSE)
    costs = [one["costs"] for one in (alone, *company.results(tmp_path / "two", 2))]
    held = [one["cost/optimizer_bytes"] for one in costs]
    assert held == pytest.approx([held[0]] * 3, rel=0.05), "of all ranks, padding included"


@needed
@pytest.mark.slow
@pytest.mark.parametrize("arm", OTHERS)
def test_every_strategy_and_kind_of_model_ends_as_with_one_process(composed, tmp_path, arm):
    stage, words = OTHERS[arm]
    compare(composed, tmp_path, single(words), zero(stage), 1e-4 if "depth" in arm else CLOSE)


@needed
@pytest.mark.slow
def test_offloading_changes_no_result(composed, tmp_path):
    offload = ("trainer.engine.offload_optimizer=true", "trainer.engine.offload_parameters=true")
    compare(composed, tmp_path, single(WITH_ALL), zero(3, *offload), CLOSE)


@needed
@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_stopped_inside_an_experience_it_goes_on_with_the_same_bits_and_in_other_ranks(
    composed, tmp_path, stage
):
    precision, close = ("bf16-mixed", 0.1) if stage == 3 else ("32-true", 1e-4)
    arm = (*single(WITH_ALL), f"trainer.precision={precision}", *zero(stage))
    two, three = (composed(*arm, f"trainer.devices={size}") for size in (2, 3))
    for name in ("whole", "parted", "three"):
        (tmp_path / name).mkdir()
    company.among(2, company.run, two, tmp_path / "whole", folder=tmp_path / "whole")
    for name in ("parted", "three"):
        with pytest.raises(Exception, match="process"):
            company.among(2, company.run, two, tmp_path / name, stop_at(4), folder=tmp_path / name)
    company.among(2, company.run, two, tmp_path / "parted", folder=tmp_path / "parted")
    company.among(3, company.run, three, tmp_path / "three", folder=tmp_path / "three")
    whole, third = company.results(tmp_path / "whole", 2)[0], company.results(tmp_path / "three", 3)[0]
    for parted in company.results(tmp_path / "parted", 2):
        assert company.largest_difference(whole["weights"], parted["weights"]) == 0
        assert torch.equal(whole["matrix"], parted["matrix"])
    assert (third["steps"], third["ledger"]) == (whole["steps"], whole["ledger"])
    assert company.largest_difference(whole["weights"], third["weights"]) < close


def pieces_are_small(run: Run) -> None:
    """In every step hold what a rank keeps against its share."""
    stage, tick, model = run.spec.engine.stage, run.learner.tick, run.learner.model  # type: ignore[union-attr]

    def ticking() -> None:
        tick()
        learning = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)
        states = run.trainer.optimizers[0].state.values()
        held = sum(v.numel() for state in states for v in state.values() if v.dim())
        if run.learner.batches > 1:  # two batches make a step, and the first step what is remembered
            assert 0.9 * learning < held < 1.1 * learning  # two moments, halved
        pieces = sum(p.ds_tensor.numel() if stage == 3 else p.numel() for p in model.parameters())
        whole = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
        assert abs(pieces - whole / (2 if stage == 3 else 1)) < 0.01 * whole

    run.learner.tick = ticking


@needed
@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_a_rank_holds_its_share_while_it_trains(composed, tmp_path, stage):
    config = composed(*single(WITH_ALL), *zero(stage), "trainer.devices=2")
    company.among(2, company.run, config, tmp_path, pieces_are_small, folder=tmp_path)


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'cl-moe\[deepspeed\]'"):
        DeepSpeed().check_start(num_ranks=2)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"stage": 0}, "stage"),
        ({"offload_parameters": True}, "offload_parameters"),
        ({"stage": True}, "stage"),
    ],
)
def test_what_zero_cannot_do_is_refused(options, key):
    with pytest.raises(InputError, match=f"change: trainer.engine.{key}"):
        DeepSpeed(**options)


def test_zero_refuses_double_precision():
    with pytest.raises(InputError, match="allowed: 32-true, bf16-mixed\n"):
        TrainerSpec(devices=2, precision="64-true", engine=DeepSpeed())
