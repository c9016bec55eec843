"""Two ranks over gloo learn what one process learns from the same global batches."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from cl_moe import agreement, stopping
from cl_moe.agreement import check_alike, part_of, share_values
from cl_moe.errors import RunFailedError
from cl_moe.run import Run
from tests import company

pytestmark = pytest.mark.usefixtures("no_drawing")

# 289, 288 and 289 examples: the last batch of 32 has one, so that one of the ranks has none
DIGITS = ("trainer.epochs=1", "stream.tune_on_first=3", "tracking=none", "trainer.precision=64-true")
GROWN = (
    *("layer=moe", "layer.hidden=16", "growth=every_experience", "growth.num_experts=4"),
    *("freeze=past_experts", "router.balance=0.01", "router.z_loss=0.001"),
)
SMALL_TEXT = (
    *("stream=text_domains", "stream.train_bytes=4000", "stream.test_bytes=2000", "stream.context=32"),
    *("model.width=16", "tracking=none", "trainer.precision=64-true"),
)
WITH_ALL = (
    *(*DIGITS, *GROWN, "strategy=replay", "strategy.replay.memory_size=60", "optimizer=adamw"),
    *("optimizer.state=carry", "trainer.accumulate=2", "trainer.gradient_clip=0.5"),
)
ARMS = {
    "lwf": (*DIGITS, *GROWN, "strategy=lwf"),
    "der": (*DIGITS, *GROWN, "strategy=der"),
    "ewc": (*DIGITS, *GROWN, "strategy=ewc", "strategy.ewc.samples=20"),
    "si": (*DIGITS, *GROWN, "strategy=si"),
    "mas": (*DIGITS, *GROWN, "strategy=mas", "strategy.mas.samples=20"),
    "gem": (*DIGITS, *GROWN, "strategy=gem"),
    "agem": (*DIGITS, *GROWN, "strategy=agem"),
    "gdumb": (*DIGITS, *GROWN, "strategy=gdumb"),
    "icarl": (*DIGITS, *GROWN, "strategy=icarl"),
    "lifelong_moe": (*DIGITS, *GROWN, "strategy=lifelong_moe"),
    "sparse_memory": (
        *(*DIGITS, "layer=peer", "layer.num_experts=64", "layer.k=4", "strategy=sparse_memory"),
        *("growth=every_experience", "growth.num_experts=16"),
    ),
    "causal text, padded": (*SMALL_TEXT, *GROWN),
    "hidden words at depth": (*SMALL_TEXT, *GROWN, "model=encoder", "model.depth=0.5", "strategy=replay"),
}


def frozen_stay(run: Run) -> None:
    """On every rank, hold what is frozen to its bits at each boundary."""
    close, then = run.close_boundary, dict[str, torch.Tensor]()

    def closing(*arguments: object) -> None:
        close(*arguments)  # type: ignore[arg-type]
        for name, parameter in run.learner.model.named_parameters():
            if not parameter.requires_grad:
                assert torch.equal(then.setdefault(name, parameter.detach().clone()), parameter), name

    run.close_boundary = closing  # type: ignore[method-assign]


def compare(
    composed: Callable,
    folder: Path,
    arm: tuple[str, ...],
    engine: tuple[str, ...] = ("trainer=ddp",),
    close: float = 1e-6,
    size: int = 2,
) -> dict:
    """One process and several ranks, weights so close in the end; returns what the first left."""
    for name in ("one", "two"):
        (folder / name).mkdir()
    company.run(composed(*arm), folder / "one")
    two = composed(*engine, f"trainer.devices={size}", *arm)
    company.among(size, company.run, two, folder / "two", frozen_stay, folder=folder / "two")
    alone, (first, *_, second) = company.results(folder / "one", 1)[0], company.results(folder / "two", size)
    assert company.largest_difference(first["weights"], second["weights"]) == 0
    assert alone["ledger"] == first["ledger"] == second["ledger"]
    assert alone["frozen"] == first["frozen"]
    assert alone["frozen"] or "freeze=past_experts" not in arm
    assert alone["steps"] == first["steps"]
    assert alone["costs"]["cost/examples_seen"] == first["costs"]["cost/examples_seen"]
    # float64 but for parts that compute in float32 (softened answers): a thousandth of what a step moves
    assert company.largest_difference(alone["weights"], first["weights"]) < close
    torch.testing.assert_close(first["matrix"], alone["matrix"], atol=close, rtol=0, equal_nan=True)
    return alone


def test_three_grown_experiences_end_as_with_one_process(composed, tmp_path):
    compare(composed, tmp_path, WITH_ALL)


@pytest.mark.slow
@pytest.mark.parametrize("arm", ARMS)
def test_every_strategy_and_kind_of_model_ends_as_with_one_process(composed, tmp_path, arm):
    compare(composed, tmp_path, ARMS[arm])


def decide_apart(run: Run) -> None:
    """Ranks that would grow differently by themselves: other sizes, other numbers drawn."""
    run.growth.newborns = lambda census: 2 + agreement.rank() if census.experience else 0  # type: ignore
    run.seed_init = agreement.rank()


def test_rank_0_decides_how_all_grow(composed, tmp_path):
    config = composed("trainer=ddp", "trainer.devices=2", *DIGITS, *GROWN, "stream.tune_on_first=2")
    company.among(2, company.run, config, tmp_path, decide_apart, folder=tmp_path)
    first, second = company.results(tmp_path, 2)
    assert [event["num_experts"] for event in first["ledger"] if event["act"] == "grow"] == [2]
    assert first["ledger"] == second["ledger"]
    assert company.largest_difference(first["weights"], second["weights"]) == 0


def stop_at(batch: int) -> company.Change:
    """A signal that reaches the last rank only, inside the second experience."""

    def change(run: Run) -> None:
        tick = run.learner.tick

        def ticking() -> None:
            tick()
            if agreement.rank() == 1 and run.boundary == 1 and run.learner.batches == batch:
                stopping._noted = signal.SIGTERM

        run.learner.tick = ticking

    return change


def test_stopped_on_one_rank_all_save_and_go_on_with_the_same_bits(composed, tmp_path):
    arm = (*DIGITS, *GROWN, "layer.dropout=0.2", "trainer.precision=32-true", "strategy=replay")
    config = composed("trainer=ddp", "trainer.devices=2", *arm)
    for name in ("whole", "parted"):
        (tmp_path / name).mkdir()
    company.among(2, company.run, config, tmp_path / "whole", folder=tmp_path / "whole")
    with pytest.raises(Exception, match="process"):
        company.among(2, company.run, config, tmp_path / "parted", stop_at(4), folder=tmp_path / "parted")
    ended = [json.loads(path.read_text()) for path in (tmp_path / "parted" / "meeting").glob("rank_*.json")]
    assert [one["kind"] for one in ended] == ["stopped", "stopped"]
    assert all("after experience 1 of 3 and 4 batches" in one["message"] for one in ended)
    company.among(2, company.run, config, tmp_path / "parted", folder=tmp_path / "parted")
    for whole, parted in zip(*(company.results(tmp_path / n, 2) for n in ("whole", "parted")), strict=True):
        assert company.largest_difference(whole["weights"], parted["weights"]) == 0
        assert torch.equal(whole["matrix"], parted["matrix"])
        for key in ("cost/train_flops", "cost/examples_seen"):
            assert whole["costs"][key] == parted["costs"][key]


@pytest.mark.slow
def test_a_checkpoint_of_two_ranks_goes_on_in_one(composed, tmp_path):
    arm = (*DIGITS, *GROWN)
    config = composed("trainer=ddp", "trainer.devices=2", *arm)
    with pytest.raises(Exception, match="process"):
        company.among(2, company.run, config, tmp_path, stop_at(4), folder=tmp_path)
    company.run(composed("trainer=ddp", "trainer.devices=1", *arm), tmp_path)
    went_on = company.results(tmp_path, 1)[0]
    (tmp_path / "alone").mkdir()
    company.run(composed(*arm), tmp_path / "alone")
    alone = company.results(tmp_path / "alone", 1)[0]
    assert company.largest_difference(went_on["weights"], alone["weights"]) < 1e-6
    assert went_on["costs"]["cost/examples_seen"] == alone["costs"]["cost/examples_seen"]
    # Of steps in which some experts are frozen a few are counted and stand for the others (Charges); which
    # ones begins anew with other numbers of rows, so that the sums differ by what chose frozen ones.
    flops = [one["costs"]["cost/train_flops"] for one in (went_on, alone)]
    assert flops[0] == pytest.approx(flops[1], rel=1e-3)


def agree() -> None:
    rank, size = agreement.rank(), agreement.num_ranks()
    assert agreement.most(3 - rank) == 3
    assert agreement.from_first(lambda: f"made by {agreement.rank()}") == "made by 0"
    assert agreement.averages({"both": float(rank), **({"one": 4.0} if rank else {})}) == {
        "both": 0.5,
        "one": 2.0,
    }
    rows = torch.arange(5)
    part = part_of(rows, rows, None, 3, lambda targets: torch.tensor(len(targets)), torch.device("cpu"))
    assert part.inputs.tolist() == ([0, 3], [1, 2, 4])[rank]
    assert part.num_new == (1, 2)[rank]
    assert part.share == (0.8, 1.2)[rank]
    assert agreement.rows_of_all(part.inputs[: part.num_new]).tolist() == [0, 1, 2]
    model = nn.Linear(2, 2)
    nn.init.constant_(model.weight, rank)
    with pytest.raises(RunFailedError, match="ranks differ now: weight"):
        check_alike(model, "now")
    share_values(model)
    check_alike(model, "now")
    assert size == 2
    assert not model.weight.any()


def test_agreements(tmp_path):
    company.among(2, agree, folder=tmp_path)


def drift_apart(run: Run) -> None:
    end = run.learner.on_train_end

    def ending() -> None:
        end()
        with torch.no_grad():
            next(run.learner.model.parameters())[0].add_(1e-6 * agreement.rank())

    run.learner.on_train_end = ending  # type: ignore[method-assign]


def test_ranks_that_drift_apart_are_noticed(composed, tmp_path):
    config = composed("trainer=ddp", "trainer.devices=2", *DIGITS, "stream.tune_on_first=1")
    with pytest.raises(Exception, match="process"):
        company.among(2, company.run, config, tmp_path, drift_apart, folder=tmp_path)
    ended = [json.loads(path.read_text()) for path in (tmp_path / "meeting").glob("rank_*.json")]
    assert any("ranks differ after training on digits 0-1" in one["message"] for one in ended)
