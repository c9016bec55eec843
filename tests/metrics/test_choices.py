"""Choices of a probe set and peaks of loads, folded from routings, against loops over pairs."""

from __future__ import annotations

import pytest
import torch

from cl_moe.layers import MoE, Routing
from cl_moe.layers.routing import ExpertLoad, fold_load
from cl_moe.metrics import PeakLoads, Tally
from cl_moe.metrics.choices import POSITIONS, ProbeChoices, choices_of

ROWS, LENGTH, EXPERTS = 6, 20, 5
PLACES = range(0, LENGTH, -(-LENGTH // POSITIONS))


def regular(seed: int, padding: bool = False) -> Routing:
    draw = torch.Generator().manual_seed(seed)
    shape = (ROWS * LENGTH, 3)
    expert = torch.randint(EXPERTS, shape, generator=draw)  # a head may repeat what another has
    kept = torch.rand(shape, generator=draw) < 0.8
    valid = torch.rand(ROWS * LENGTH, generator=draw) < 0.7 if padding else None
    return Routing(expert, kept.float(), kept, ROWS * LENGTH, EXPERTS, valid=valid)


def ragged(seed: int) -> Routing:
    """The same pairs as a flat list in another order, some of them not asked for."""
    routing = regular(seed, padding=True)
    token, expert, weight, kept = routing.pairs()
    order = torch.randperm(len(token), generator=torch.Generator().manual_seed(seed))
    parts = {"expert": expert[order], "weight": weight[order], "kept": kept[order]}
    return routing._replace(**parts, token=token[order], asked=kept[order])


def by_hand(routing: Routing, rows: list[int]) -> tuple[list[set[int]], int]:
    sets = {row * LENGTH + place: set[int]() for row in rows for place in PLACES}
    real = [token for token in sets if routing.valid is None or routing.valid[token]]
    for token, expert, _, kept in zip(*(part.tolist() for part in routing.pairs()), strict=True):
        if kept and token in real:
            sets[token].add(expert)
    return list(sets.values()), len(real)


def sets_of(choices) -> list[set[int]]:
    return [set(part.tolist()) for part in choices.expert.split(choices.size.tolist())]


@pytest.mark.parametrize("routing", [regular(0), regular(1, padding=True), ragged(2)])
@pytest.mark.parametrize("rows", [[0, 1, 2, 3, 4, 5], [1, 4], [3]])
def test_the_kept_experts_of_chosen_rows(routing, rows):
    found = choices_of(routing, torch.tensor(rows), ROWS)
    assert (sets_of(found), found.num_real) == by_hand(routing, rows)
    assert (found.expert.dtype, found.size.dtype) == (torch.int32, torch.int32)


def test_nothing_is_routed():
    nothing = Routing(torch.empty(6, 0).long(), torch.empty(6, 0), torch.empty(6, 0).bool(), 6, 0)
    found = choices_of(nothing, torch.tensor([0, 5]), 6)
    assert (found.expert.numel(), found.size.tolist(), found.num_real) == (0, [0, 0], 2)


@pytest.mark.parametrize("size", [1, 4, 5, 32])
def test_batches_of_any_size_give_the_same(size):
    layer = MoE(dim=4, num_experts=6, hidden=4).eval()
    inputs, rows = torch.randn(32, 4), [torch.tensor([0, 3, 4, 17, 31]), torch.empty(0).long()]
    probe = ProbeChoices(rows)
    for part in inputs.split(size):
        with torch.no_grad():
            routing = {0: layer(part)[1], -1: layer(part)[1]}  # -1: a block at depth
        probe.update(0, len(part), routing)
    first, second = probe.compute()
    whole = layer(inputs)[1].expert[rows[0]].sort(dim=1).values
    assert list(first) == [0]
    assert torch.equal(first[0].expert, whole.reshape(-1).int())
    assert second == {}


def load(*counts: int) -> ExpertLoad:
    count = torch.tensor(counts)
    return ExpertLoad(count.double(), count, count.sum())


def test_peaks_are_sums_over_batches():
    peaks = PeakLoads(2)
    peaks.update(0, {3: load(1, 1, 4), 5: load(2, 2)})
    peaks.update(0, {3: load(2, 2, 2)})
    peaks.update(1, {3: load(0, 0, 0)})  # nothing was routed
    found = peaks.compute()
    assert found[3].tolist() == [[3.0, 2.0], [0.0, 0.0]]
    assert found[5].tolist() == [[1.0, 1.0], [0.0, 0.0]]
    one = PeakLoads(1)
    one.update(0, {0: load(3)})
    assert one.compute()[0].tolist() == [[1.0, 1.0]]


def test_a_tally_adds_up_where_the_model_computes():
    tally = Tally(2)
    there = torch.device("meta")  # stands for any device that is not the CPU
    scored = torch.zeros((), device=there), torch.zeros((), dtype=torch.int64, device=there)
    tally.update(0, scored, 3, {})
    for sums in (tally.scores.score_sum, tally.scores.count, tally.calibration.sums):
        assert sums.device == there
    assert {tally.peaks.device, tally.loads.device} == {there}


def test_a_tally_folds_everything_at_once():
    layer = MoE(dim=4, num_experts=6, hidden=4).eval()
    tally = Tally(2, [torch.tensor([1]), torch.tensor([0])])
    batches = [(0, torch.randn(3, 4)), (1, torch.randn(5, 4)), (0, torch.randn(2, 4))]
    expected = [torch.zeros(6, dtype=torch.int64) for _ in range(2)]
    for place, part in batches:
        with torch.no_grad():
            _, routing = layer(part)
        expected[place] += fold_load(routing).count
        tally.update(place, (torch.tensor(1.0), torch.tensor(len(part))), len(part), {0: routing})
    tally.update(0, (torch.tensor(1.0), torch.tensor(5)), 5, {})  # a pass of which routings do not matter
    assert tally.scores.compute().tolist() == [3 / 10, 1 / 5]
    for at in range(2):
        assert torch.equal(tally.loads.compute()[0][at].count, expected[at])
    assert tally.peaks.compute()[0][:, 1].tolist() == [2, 1]
    assert [found[0].size.tolist() for found in tally.choices.compute()] == [[2], [2]]
