"""What is kept of training: by an oracle over the same batches, and over a restart at any batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cl_moe.growth import Looks, Trace
from cl_moe.growth.adapt import take_census
from cl_moe.layers.routing import Routing
from cl_moe.seeds import generator

LOOKS = Looks(samples=5, losses=True, loads=True)
SIZES = [{0: (3,)}, {0: (3, 2)}]


def batch(experience: int, number: int) -> tuple[Tensor, dict[int, Routing]]:
    draw = generator(0, experience, number)
    losses = torch.rand(3, generator=draw, dtype=torch.float64)
    size = sum(SIZES[experience][0])
    expert = torch.randint(size, (3, 2), generator=draw)
    weight = torch.rand(3, 2, generator=draw)
    return losses, {0: Routing(expert, weight, torch.ones(3, 2, dtype=torch.bool), 3, size)}


def followed(stop: tuple[int, int] | None = None) -> Trace:
    """Two experiences of two passes of three batches; a new process takes over before batch ``stop``."""
    trace = Trace(LOOKS)
    for experience in range(2):
        trace.open(3, experience)
        for number in range(6):
            if stop == (experience, number):
                old, trace = trace, Trace(LOOKS)
                trace.load_state_dict(old.state_dict())
            trace.add(*batch(experience, number))
        trace.close(SIZES[experience])
    return trace


def test_it_keeps_the_newest_of_the_first_pass_and_the_means_of_the_last() -> None:
    trace = followed()
    losses = [[batch(e, n)[0] for n in range(6)] for e in range(2)]
    assert torch.equal(trace.newest, torch.cat(losses[1][:3])[-5:])
    assert trace.means == pytest.approx([torch.cat(row[3:]).mean().item() for row in losses])


def test_loads_are_in_units_of_the_fair_share() -> None:
    trace, expected = followed(), []
    for experience in range(2):
        load = torch.zeros(sum(SIZES[experience][0]), dtype=torch.float64)
        for number in range(3, 6):
            routing = batch(experience, number)[1][0]
            load.index_add_(0, routing.expert.flatten(), routing.weight.flatten().double())
        expected.append(load / load.sum())
    first, second = (share * len(share) for share in expected)
    torch.testing.assert_close(trace.of_layer(0, 5)[0], torch.cat([(first + second[:3]) / 2, second[3:]]))
    torch.testing.assert_close(
        trace.of_layer(0, 5)[1], torch.cat([torch.maximum(first, second[:3]), second[3:]])
    )
    assert trace.shares[0][1] == pytest.approx([expected[1][:3].sum().item(), expected[1][3:].sum().item()])


@pytest.mark.parametrize("stop", [(0, 0), (0, 2), (0, 3), (1, 0), (1, 3), (1, 5)])
def test_a_restart_changes_nothing(stop: tuple[int, int]) -> None:
    told, through = followed(stop).state_dict(), followed().state_dict()
    assert told.keys() == through.keys()
    for name in ("means", "shares", "batches"):
        assert told[name] == through[name]
    assert torch.equal(told["newest"], through["newest"])
    for name in ("totals", "peaks"):
        assert all(torch.equal(told[name][layer], value) for layer, value in through[name].items())


def test_what_nobody_asked_for_is_not_kept() -> None:
    trace = Trace()
    assert not trace.follows
    assert Looks(samples=3) | Looks(samples=2, loads=True) == Looks(3, False, True)
    trace.close({0: (3,)})
    assert (len(trace.newest), trace.means, trace.totals) == (0, [], {})


def test_the_census_of_a_newborn_begins_with_its_birth(new_model) -> None:
    trace = followed()
    mean, peak, lives = trace.of_layer(0, 7)
    assert (mean[-2:].tolist(), peak[-2:].tolist()) == ([0.0, 0.0], [0.0, 0.0])
    assert lives.tolist() == [2, 2, 2, 1, 1, 0, 0]
    trace.forget(0, [1])
    assert [kept[1] for kept in trace.of_layer(0, 5)] == [0, 0, 0]
    assert take_census(new_model("moe"), 2, [], {}).layers[0].trained is None


def test_losses_stand_at_their_experience_though_a_parent_kept_none() -> None:
    parent, child = Trace(Looks(loads=True)), Trace(Looks(losses=True))
    for trace, experiences in ((parent, (0, 1)), (child, (2, 3))):
        child.load_state_dict(parent.state_dict()) if trace is child else None
        for experience in experiences:
            trace.open(1, experience)
            trace.add(torch.tensor([float(experience)]), {})
            trace.close({})
    assert child.means[2:] == [2.0, 3.0]
    assert torch.tensor(child.means).isnan().tolist() == [True, True, False, False]
