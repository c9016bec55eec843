import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cl_moe.layers.selection import top_k_first

FLOATS = st.one_of(st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-40, -1e-40, float("-inf"), float("inf")]),
                   st.floats(allow_nan=False, width=32))  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(data=st.data())
def test_equals_sorting_by_score_then_rank(dtype, data):
    scores = data.draw(st.lists(FLOATS, min_size=1, max_size=8))
    ranks = data.draw(st.permutations(range(len(scores))))
    k = data.draw(st.integers(1, len(scores)))
    score_RN = torch.tensor([scores], dtype=dtype)
    # as Python compares them: plus and minus zero are equal
    by_position = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k]
    by_rank = sorted(range(len(scores)), key=lambda i: (-scores[i], ranks[i]))[:k]
    before = score_RN.clone()
    assert top_k_first(score_RN, k)[0].tolist() == by_position
    assert top_k_first(score_RN, k, rank_RN=torch.tensor([ranks]))[0].tolist() == by_rank
    assert torch.equal(score_RN, before)


@pytest.mark.parametrize("levels", [2, 30, 10**6])
@pytest.mark.parametrize("num", [271, 272, 512])
def test_groups_of_many_scores_choose_as_sorting_does(levels, num):
    score = torch.randint(-levels, levels, (40, num), generator=torch.Generator().manual_seed(num)).float()
    score[0, :] = -torch.inf
    score[1, 3:] = -torch.inf
    expected = score.sort(dim=1, descending=True, stable=True).indices[:, :16]
    assert torch.equal(top_k_first(score, 16), expected)
