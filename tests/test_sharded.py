"""Ranks that each hold a piece of the model learn what one process learns."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from cl_moe.engines import DDP, FSDP
from cl_moe.engines.pieces import Together
from cl_moe.errors import InputError
from cl_moe.run import Run
from tests import company
from tests.test_ranks import ARMS, DIGITS, GROWN, SMALL_TEXT, WITH_ALL, compare, stop_at

pytestmark = pytest.mark.usefixtures("no_drawing")

WHOLE_TABLES = ("optimizer=adamw", "optimizer.rows=dense")
TEXT = (*SMALL_TEXT, *GROWN)
FSDP_ARMS = {name: ARMS[name] for name in ("lwf", "der", "icarl", "lifelong_moe")} | {
    "causal text, padded": TEXT,
    "hidden words at depth": ARMS["hidden words at depth"],
    "experts in attention": (*TEXT, "model.attention_slots=[value]"),
    "looked at inside an experience": (*DIGITS, *GROWN, "eval.every=3"),
    "tables": (*DIGITS, "layer=peer", "layer.num_experts=64", "layer.k=4", *WHOLE_TABLES),
    "keys": (*DIGITS, "layer=pkm", "growth=every_experience", "growth.num_experts=16", *WHOLE_TABLES),
    "loads without a loss": (*DIGITS, *GROWN, "router.scores.bias_rate=0.01"),
}


def test_three_grown_experiences_end_as_with_one_process(composed, tmp_path):
    compare(composed, tmp_path, WITH_ALL, ("trainer=fsdp",))


@pytest.mark.slow
@pytest.mark.parametrize("arm", FSDP_ARMS)
def test_every_strategy_and_kind_of_model_ends_as_with_one_process(composed, tmp_path, arm):
    compare(composed, tmp_path, FSDP_ARMS[arm], ("trainer=fsdp",))


TENSOR_PARALLEL = ("trainer=fsdp", "trainer.engine.tensor_parallel=2")
GATED = ("layer.glu=true", "layer.activation=silu", "layer.num_shared=1")
SLICED_ARMS = {
    "experts": (2, (*WITH_ALL, *GATED)),
    "attention and experts": (2, (*TEXT, "strategy=lwf", "model.depth=0.5")),
    "attention and dense layers": (2, (*SMALL_TEXT, "layer=dense", "layer.hidden=32", "layer.glu=true")),
    "tables": (2, FSDP_ARMS["tables"]),
    "in pieces, too": (4, (*WITH_ALL, *GATED)),
    "text in pieces, too": (4, TEXT),
}


@pytest.mark.slow
@pytest.mark.parametrize("arm", SLICED_ARMS)
def test_layers_that_ranks_compute_together_end_as_with_one_process(composed, tmp_path, arm):
    size, words = SLICED_ARMS[arm]
    compare(composed, tmp_path, words, TENSOR_PARALLEL, size=size)


def test_groups_of_ranks_are_of_one_size():
    FSDP(tensor_parallel=2).check_start(4)
    with pytest.raises(InputError, match=r"change: trainer\.engine\.tensor_parallel"):
        FSDP(tensor_parallel=2).check_start(3)
    with pytest.raises(InputError, match=r"change: trainer\.engine\.tensor_parallel"):
        FSDP(tensor_parallel=0)


@pytest.mark.slow
def test_weights_may_stay_together_between_the_passes(composed, tmp_path):
    compare(composed, tmp_path, TEXT, ("trainer=fsdp", "trainer.engine.reshard=false"))


@pytest.mark.slow
@pytest.mark.parametrize("state", ["carry", "reset"])
def test_stopped_inside_an_experience_it_goes_on_with_the_same_bits_and_in_other_ranks(
    composed, tmp_path, state
):
    arm = (*DIGITS, *GROWN, "layer.dropout=0.2", "strategy=replay", "optimizer=adamw")
    arm = (*arm, f"optimizer.state={state}", "trainer.precision=bf16-mixed", "trainer=fsdp")
    two = composed(*arm, "trainer.devices=2")
    for name in ("whole", "parted", "one", "three"):
        (tmp_path / name).mkdir()
    company.among(2, company.run, two, tmp_path / "whole", folder=tmp_path / "whole")
    for name in ("parted", "one", "three"):
        with pytest.raises(Exception, match="process"):
            company.among(2, company.run, two, tmp_path / name, stop_at(4), folder=tmp_path / name)
        ended = [json.loads(p.read_text()) for p in (tmp_path / name / "meeting").glob("rank_*.json")]
        assert [one["kind"] for one in ended] == ["stopped", "stopped"]
    company.among(2, company.run, two, tmp_path / "parted", folder=tmp_path / "parted")
    company.run(composed(*arm, "trainer.devices=1"), tmp_path / "one")
    three = composed(*arm, "trainer.devices=3")
    company.among(3, company.run, three, tmp_path / "three", folder=tmp_path / "three")
    whole = company.results(tmp_path / "whole", 2)[0]
    for parted in company.results(tmp_path / "parted", 2):
        assert company.largest_difference(whole["weights"], parted["weights"]) == 0
        assert torch.equal(whole["matrix"], parted["matrix"])
    for name, size in (("one", 1), ("three", 3)):
        other = company.results(tmp_path / name, size)[0]
        assert other["steps"] == whole["steps"]
        assert other["ledger"] == whole["ledger"]


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 3])
def test_a_checkpoint_of_two_ranks_goes_on_in_others(composed, tmp_path, devices):
    arm = (*DIGITS, *GROWN, "optimizer=adamw", "optimizer.state=carry")
    two = composed("trainer=fsdp", "trainer.devices=2", *arm)
    with pytest.raises(Exception, match="process"):
        company.among(2, company.run, two, tmp_path, stop_at(4), folder=tmp_path)
    others = composed("trainer=fsdp", f"trainer.devices={devices}", *arm)
    if devices == 1:
        company.run(others, tmp_path)
    else:
        company.among(devices, company.run, others, tmp_path, folder=tmp_path)
    (tmp_path / "alone").mkdir()
    company.run(composed(*arm), tmp_path / "alone")
    went_on, alone = company.results(tmp_path, devices)[0], company.results(tmp_path / "alone", 1)[0]
    assert company.largest_difference(went_on["weights"], alone["weights"]) < 1e-6


def pieces_are_small(run: Run) -> None:
    """In every step hold what a rank keeps against its share; outside of fits the model is as it was."""
    model, tick, close = run.learner.model, run.learner.tick, run.close_boundary

    def ticking() -> None:
        tick()
        held = [p for name, p in model.named_parameters() if name.startswith("blocks.0.cohorts.")]
        local = sum(p.to_local().numel() for p in held)  # type: ignore[operator]
        assert abs(local - sum(p.numel() for p in held) / 2) <= sum(p[0].numel() for p in held)
        remembered = [v for s in run.trainer.optimizers[0].state.values() for v in s.values() if v.dim()]
        assert all(value.to_local().numel() < value.numel() for value in remembered)

    def closing(*arguments: object) -> None:
        close(*arguments)  # type: ignore[arg-type]
        assert not any(isinstance(part, FSDPModule) for part in model.modules())
        assert not any(hasattr(p, "to_local") for p in model.parameters())

    run.learner.tick, run.close_boundary = ticking, closing  # type: ignore[method-assign]


@pytest.mark.slow
def test_a_rank_holds_its_share_while_it_trains_and_all_between_fits(composed, tmp_path):
    config = composed("trainer=fsdp", "trainer.devices=2", *DIGITS, *GROWN, "optimizer=adamw")
    company.among(2, company.run, config, tmp_path, pieces_are_small, folder=tmp_path)


def test_what_was_taken_to_pieces_is_put_together_as_it_was():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    model[1].register_forward_hook(lambda *_: None)
    own = model.register_forward_pre_hook(lambda *_: None)
    before, held = {k: v.clone() for k, v in model.state_dict().items()}, list(model.parameters())

    def part() -> None:
        model[0].weight = nn.Parameter(torch.zeros(1, 3))
        model[0].note = "of the engine"
        model[1].__class__ = type("Parted", (nn.ReLU,), {})
        model.register_forward_hook(lambda *_: 1 / 0)

    together = Together(model, part)
    assert [p.numel() for p in held] == [0, 3], "what was not replaced keeps its value"
    together.again(before)
    assert all(a is b for a, b in zip(model.parameters(), held, strict=True))
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert type(model[1]) is nn.ReLU
    assert not hasattr(model[0], "note")
    assert model(torch.ones(1, 2)).shape == (1, 3)
    own.remove()
    assert not model._forward_pre_hooks
    assert len(model[1]._forward_hooks) == 1


@pytest.mark.parametrize(("engine", "strategy"), [(DDP, "l2p"), (FSDP, "ewc")])
def test_strategies_that_were_not_tried_under_an_engine_are_refused(engine, strategy):
    with pytest.raises(InputError, match=f"strategy={strategy}"):
        engine().check(nn.Linear(1, 1), ["naive", strategy], "auto", False, None)


def test_gradients_of_rows_are_refused_where_tables_lie_in_pieces():
    with pytest.raises(InputError, match="rows=row"):
        FSDP().check(nn.Linear(1, 1), ["naive"], "row", False, None)
    DDP().check(nn.Linear(1, 1), ["naive"], "row", False, None)
