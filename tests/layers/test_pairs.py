import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cl_moe.layers.pair_ops import own_pairs, pairs_by_cohort
from cl_moe.layers.pairs import Pairs, pair_dot, pair_gather, pair_sum, regular_pairs, sorted_columns


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(data=st.data())
def test_sums_and_dots_equal_dense_algebra_and_so_do_their_gradients(dtype, data):
    counts = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=6))
    columns, width = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5))
    torch.manual_seed(data.draw(st.integers(0, 9)))
    start = torch.tensor([0, *counts]).cumsum(0)
    column = torch.randint(columns, (sum(counts),))  # empty rows, unused columns and doubles included
    pairs = Pairs(start, column, columns, max_per_row=max(counts))
    row = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    a = torch.randn(len(counts), width, dtype=dtype, requires_grad=True)
    b = torch.randn(columns, width, dtype=dtype, requires_grad=True)
    w = torch.randn(sum(counts), dtype=dtype, requires_grad=True)
    ours = pair_sum(w * pair_dot(a, b, pairs), b, pairs)
    dense = torch.zeros_like(a).index_add(0, row, (w * (a[row] * b[column]).sum(-1))[:, None] * b[column])
    torch.testing.assert_close(ours, dense)
    probe = torch.randn_like(ours)
    grads = [torch.autograd.grad((out * probe).sum(), (a, b, w)) for out in (ours, dense)]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_transposing_twice_gives_the_pairs_back():
    column = torch.tensor([[2, 0], [1, 2], [2, 2]])
    pairs = regular_pairs(column, 4)
    by_column, order = pairs.transpose()
    assert by_column.start_R1.tolist() == [0, 1, 2, 6, 6]
    assert by_column.column_P.tolist() == [0, 1, 0, 1, 2, 2]
    assert order.tolist() == [1, 2, 0, 3, 4, 5]
    back, _ = by_column.transpose()
    assert torch.equal(back.start_R1, pairs.start_R1)
    assert torch.equal(back.column_P, column.sort(dim=1).values.reshape(-1))


def test_gather_copies_rows_to_numbered_places():
    pairs = Pairs(torch.tensor([0, 2, 2, 3]), torch.tensor([2, 0, 1]), 3)
    table = torch.arange(6.0).reshape(3, 2).requires_grad_()
    out = pair_gather(table, pairs)
    assert torch.equal(out, table[[0, 2, 0]])
    (grad,) = torch.autograd.grad((out * torch.tensor([[1.0], [10.0], [100.0]])).sum(), table)
    assert grad[:, 0].tolist() == [101.0, 0.0, 10.0]


@pytest.mark.parametrize("num", [256, 257, 2**15, 2**15 + 1, 2**31, 2**31 + 1])
def test_columns_are_sorted_as_numbers_whatever_they_are_sorted_as(num):
    column = torch.tensor([num - 1, 0, num // 2, num - 1, 0])
    ordered, order = sorted_columns(column, num)
    assert ordered.tolist() == [0, 0, num // 2, num - 1, num - 1]
    assert order.tolist() == [1, 4, 2, 0, 3]


def test_pairs_of_all_cohorts_are_those_of_each():
    """Also of one that nobody chose, and where ids have a gap."""
    generator = torch.Generator().manual_seed(0)
    firsts, sizes = [2, 5, 9, 20], [3, 4, 1, 300]
    ids = torch.cat([torch.arange(first, first + size) for first, size in zip(firsts, sizes, strict=True)])
    expert = ids[ids != 9][torch.randint(len(ids) - 1, (7, 6), generator=generator)]
    expert[:, 0] = 5
    at, found = pairs_by_cohort(expert, firsts, sizes)
    for own_at, pairs, first, size in zip(
        at.split([own.column_P.numel() for own in found]), found, firsts, sizes, strict=True
    ):
        expected_at, expected = own_pairs(expert, first, size)
        assert torch.equal(own_at, expected_at)
        assert torch.equal(pairs.start_R1, expected.start_R1)
        assert torch.equal(pairs.column_P, expected.column_P)
        assert (pairs.num_columns, pairs.full_product) == (expected.num_columns, expected.full_product)
