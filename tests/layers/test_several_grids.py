"""The search over several grids at once, against sorting all their experts."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from cl_moe.layers.product_keys import shell_coordinates
from cl_moe.layers.several_grids import KeyScores, search_grids


@given(st.data())
def test_a_union_of_grids_is_searched_exactly_with_the_rule_for_ties(data):
    """Also where a grid is all of what is retrieved, or nothing of it, and ids have gaps between grids."""
    torch.manual_seed(data.draw(st.integers(0, 99)))
    levels = data.draw(st.sampled_from([2, 3, 1000]))
    sizes = data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
    lift = data.draw(st.sampled_from([0, 2, 2000]))
    k = data.draw(st.integers(1, min(30, sum(size**2 for size in sizes))))
    grids = [
        [torch.randint(levels, (3, size)).float() + lift * (g == 1) for _ in range(2)]
        for g, size in enumerate(sizes)
    ]
    firsts = [10 * g + sum(size**2 for size in sizes[:g]) for g in range(len(sizes))]
    sides = [torch.cat(side, dim=1) for side in zip(*grids, strict=True)]
    found = search_grids(KeyScores(sides, sizes), firsts, k)
    for q in range(3):
        cells = []
        for g, (grid, first) in enumerate(zip(grids, firsts, strict=True)):
            for e in range(sizes[g] ** 2):
                i, j = (int(at) for at in shell_coordinates(torch.tensor(e)))
                cells.append((-float(grid[0][q, i] + grid[1][q, j]), g, max(i, j), i, j, first + e))
        cells.sort()
        assert found.expert[q].tolist() == [cell[-1] for cell in cells[:k]]
        assert found.score[q].tolist() == [-cell[0] for cell in cells[:k]]
