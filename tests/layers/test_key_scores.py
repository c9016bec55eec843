"""Scores written side by side, against each cohort's own products."""

import pytest
import torch

from cl_moe.layers.key_cohort import KeyCohort
from cl_moe.layers.key_scores import ScoreRoom, differentiable_scores
from cl_moe.layers.queries import Queries


@pytest.mark.parametrize("per_head", [False, True])
def test_scores_in_one_room_have_the_bits_of_each_cohorts_own_product(per_head):
    """So a growth, which makes the room wider, moves no bit of old scores."""
    torch.manual_seed(0)
    cohorts = [
        KeyCohort(8, range(size), Queries(2, 1, 8, "none"), {"v": 1.0}, keys_per_head=per_head)
        for size in (5, 1, 33)
    ]
    query = torch.randn(22, 2, 4)
    pieces = query.split(8)
    with torch.no_grad():
        room = ScoreRoom(cohorts, pieces[0])
        found = [[side.clone() for side in room(piece).sides] for piece in pieces]
        for piece, sides in zip(pieces, found, strict=True):
            expected = differentiable_scores(cohorts, [piece] * 3)
            assert expected.widths == room.widths == [5, 1, 33]
            for side in range(2):
                own = torch.cat([cohort.scores(piece, side, cohort.keys) for cohort in cohorts], dim=1)
                assert torch.equal(sides[side], own)
                assert torch.equal(expected.sides[side], own)
    for place in range(3):
        of_one = expected.of(place)
        assert torch.equal(of_one.sides[1], cohorts[place].scores(pieces[-1], 1, cohorts[place].keys))
