"""Ranks that own experts, and ranks that exchange rows, learn what one process learns."""

from __future__ import annotations

import json

import pytest
import torch

from cl_moe import agreement
from cl_moe.engines import DDP
from cl_moe.errors import InputError
from cl_moe.run import Run
from tests import company
from tests.test_ranks import ARMS, DIGITS, GROWN, SMALL_TEXT, WITH_ALL, compare, stop_at

pytestmark = pytest.mark.usefixtures("no_drawing")

SHARDED = ("trainer=ddp", "trainer.engine.experts=sharded")
TABLES = (*DIGITS, "layer=peer", "layer.num_experts=64", "layer.k=4", "optimizer=adamw")
GROWING_TABLES = (*TABLES, "growth=every_experience", "growth.num_experts=16", "freeze=past_experts")
CARRIED = ("optimizer.state=carry", "trainer.gradient_clip=0.5", "trainer.accumulate=2")
OWNED = {
    "lwf": ARMS["lwf"],
    "der": ARMS["der"],
    "icarl": ARMS["icarl"],
    "lifelong_moe": ARMS["lifelong_moe"],
    "text": (*SMALL_TEXT, *GROWN, "model.attention_slots=[value]", "layer.num_experts=3"),
    "hidden words at depth": ARMS["hidden words at depth"],
    "tables": (*GROWING_TABLES, *CARRIED, "optimizer.rows=dense"),
    "rows": (*GROWING_TABLES, *CARRIED, "optimizer.rows=row"),
    "keys": (*DIGITS, "layer=pkm", "growth=every_experience", "growth.num_experts=16", "optimizer.rows=row"),
}


def test_three_grown_experiences_with_owners_end_as_with_one_process(composed, tmp_path):
    compare(composed, tmp_path, WITH_ALL, SHARDED)


def test_rows_that_are_exchanged_end_as_with_one_process(composed, tmp_path):
    compare(composed, tmp_path, (*GROWING_TABLES, *CARRIED, "optimizer.rows=row"))


@pytest.mark.slow
@pytest.mark.parametrize("arm", OWNED)
def test_every_kind_of_model_with_owners_ends_as_with_one_process(composed, tmp_path, arm):
    compare(composed, tmp_path, OWNED[arm], SHARDED)


def hold_half(run: Run) -> None:
    """While it trains, a rank has its own experts alone, and remembers nothing of others."""
    tick, seen = run.learner.tick, list[int]()

    def ticking() -> None:
        tick()
        for layer in run.learner.model.expert_layers.values():
            for cohort in layer.cohorts:
                assert cohort.w_in.shape[0] == cohort.num_experts // 2
                seen.append(agreement.rank())
        (optimizer,) = run.trainer.optimizers
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in run.learner.parameters() if p.requires_grad}

    run.learner.tick = ticking


@pytest.mark.slow
def test_each_rank_holds_its_own_experts_alone(composed, tmp_path):
    config = composed(*SHARDED, "trainer.devices=2", *DIGITS, *GROWN, "stream.tune_on_first=2")
    company.among(2, company.run, config, tmp_path, hold_half, folder=tmp_path)
    first, _ = company.results(tmp_path, 2)
    (whole,) = [value for name, value in first["weights"].items() if name.endswith("cohorts.0.w_in")]
    assert len(whole) == 8, "and all of them between fits"


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2, 3])
def test_stopped_inside_an_experience_it_goes_on_with_the_same_bits_or_in_other_ranks(
    composed, tmp_path, devices
):
    arm = (*DIGITS, *GROWN, "strategy=replay", "optimizer=adamw", "optimizer.state=carry", *SHARDED)
    two = composed(*arm, "trainer.devices=2")
    for name in ("whole", "parted"):
        (tmp_path / name).mkdir()
    company.among(2, company.run, two, tmp_path / "whole", folder=tmp_path / "whole")
    with pytest.raises(Exception, match="process"):
        company.among(2, company.run, two, tmp_path / "parted", stop_at(4), folder=tmp_path / "parted")
    ended = [json.loads(p.read_text()) for p in (tmp_path / "parted" / "meeting").glob("rank_*.json")]
    assert [one["kind"] for one in ended] == ["stopped", "stopped"]
    others = composed(*arm, f"trainer.devices={devices}")
    if devices == 1:
        company.run(others, tmp_path / "parted")
    else:
        company.among(devices, company.run, others, tmp_path / "parted", folder=tmp_path / "parted")
    whole = company.results(tmp_path / "whole", 2)[0]
    for parted in company.results(tmp_path / "parted", devices):
        assert parted["ledger"] == whole["ledger"]
        assert parted["steps"] == whole["steps"]
        apart = company.largest_difference(whole["weights"], parted["weights"])
        assert apart == 0 if devices == 2 else apart < 1e-6
        torch.testing.assert_close(parted["matrix"], whole["matrix"], atol=1e-6, rtol=0, equal_nan=True)


def test_what_looks_at_experts_weights_is_refused_where_they_have_owners():
    model = torch.nn.Linear(2, 2)
    DDP(experts="sharded").check(model, ["lwf"], "row", False, None)
    with pytest.raises(InputError, match="strategy=ewc"):
        DDP(experts="sharded").check(model, ["ewc"], "dense", False, None)
    with pytest.raises(InputError, match=r"change: trainer\.engine\.experts"):
        DDP(experts="both")  # type: ignore[arg-type]
