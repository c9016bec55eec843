import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cl_moe.layers import PEER, PKM
from cl_moe.layers.tables import ExpertTable, dense, dense_gradients, row_gradient, summed_rows

LAYERS = {
    "peer": lambda: PEER(8, 400, heads=3, k=4, key_dim=4, glu=True),
    "pkm": lambda: PKM(8, 400, heads=3, k=4, key_dim=4),
}


def tables(layer):
    return {name: p for name, p in layer.named_parameters() if isinstance(p, ExpertTable)}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_of_rows_are_the_dense_ones_bit_for_bit(kind, checkpointed):
    torch.manual_seed(0)
    layers = [LAYERS[kind]()]
    layers[0].grow(100)
    layers.append(copy.deepcopy(layers[0]))
    xs = [torch.randn(5, 8), torch.randn(6, 8)]  # two passes add up
    for layer, by_rows in zip(layers, (False, True), strict=True):
        for table in tables(layer).values():
            table.by_rows = by_rows
        for x in xs:
            out = (
                torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False) if checkpointed else layer(x)
            )
            out[0].square().sum().backward()
    names = tables(layers[0])
    assert set(names) == {f"cohorts.{c}.{t}" for c in (0, 1) for t in layers[0].cohorts[0].tables}
    for name, table in names.items():
        other = layers[1].get_parameter(name)
        assert other.grad.is_sparse
        row, value = row_gradient(other)
        assert other.grad._nnz() == len(row) < len(table)
        assert (row[1:] > row[:-1]).all()
        assert torch.equal(dense(other.grad), table.grad)
        assert torch.equal(value, table.grad[row])
    for (name, p), q in zip(layers[0].named_parameters(), layers[1].parameters(), strict=True):
        assert name in names or torch.equal(p.grad, q.grad)
    dense_gradients(layers[1].parameters())
    assert all(torch.equal(layers[1].get_parameter(n).grad, t.grad) for n, t in names.items())


@given(st.data())
def test_rows_are_summed_in_the_order_they_came_in(data):
    row = torch.tensor(data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=12)))
    value = torch.randn(len(row), 2, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 9))))
    expected = {}
    for r, v in zip(row.tolist(), value, strict=True):
        expected[r] = expected[r] + v if r in expected else v
    rows, sums = summed_rows(row, value)
    assert rows.tolist() == sorted(expected)
    torch.testing.assert_close(sums, torch.stack([expected[r] for r in sorted(expected)]))


def test_copies_stand_ins_and_state_are_plain():
    layer = LAYERS["peer"]()
    layer.cohorts[0].u.by_rows = True
    twin = copy.deepcopy(layer)
    assert isinstance(twin.cohorts[0].u, ExpertTable)
    assert not twin.cohorts[0].u.by_rows
    assert all(type(value) is torch.Tensor for value in layer.state_dict().values())
    values = {name: p.detach().clone().requires_grad_() for name, p in layer.named_parameters()}
    out, _ = torch.func.functional_call(layer, values, (torch.randn(3, 8),))
    out.sum().backward()
    assert not values["cohorts.0.u"].grad.is_sparse
    assert layer.cohorts[0].u.grad is None
    assert isinstance(layer.double().cohorts[0].u, ExpertTable)


@pytest.mark.parametrize("kind", LAYERS)
def test_what_is_done_apart_equals_what_the_compiler_sees(kind, monkeypatch):
    """Scores' gradients, groups of candidates and sparse kernels against the stock ones."""
    torch.manual_seed(0)
    layers = [LAYERS[kind]()]
    layers[0].grow(100)
    layers.append(copy.deepcopy(layers[0]))
    x = torch.randn(40, 8)
    found = []
    for layer, stock in zip(layers, (False, True), strict=True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda stock=stock: stock)
        out, routing = layer(x)
        out.square().sum().backward()
        found.append((out, routing))
    assert torch.equal(found[0][1].expert, found[1][1].expert)
    torch.testing.assert_close(found[0][0], found[1][0])
    for a, b in zip(layers[0].parameters(), layers[1].parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-4)
