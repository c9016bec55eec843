"""Tables that learn by rows: as the dense optimizer where all rows are touched, lazily where they are not."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cl_moe.errors import InputError
from cl_moe.layers import PEER
from cl_moe.layers.tables import ExpertTable, row_gradient, sparse_rows
from cl_moe.optim import (
    SGD,
    Adagrad,
    AdamW,
    ByRows,
    OptimizerSpec,
    clip_gradients,
    load_state_by_name,
    state_by_name,
)

SPECS: dict[str, Callable[[str], OptimizerSpec]] = {
    "adamw": lambda rows: AdamW(lr=0.01, weight_decay=0.1, rows=rows, state="carry"),
    "sgd": lambda rows: SGD(lr=0.1, momentum=0.9, weight_decay=0.01, rows=rows, state="carry"),
    "plain sgd": lambda rows: SGD(lr=0.1, rows=rows, state="carry"),
    "adagrad": lambda rows: Adagrad(lr=0.05, rows=rows, state="carry"),
}
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def peer(num_experts: int = 64) -> PEER:
    torch.manual_seed(0)
    return PEER(16, num_experts, heads=4, k=8, key_dim=8, query_norm="none")  # a norm leaves biases to noise


def learn(
    layer: PEER,
    optimizer: torch.optim.Optimizer,
    steps: range,
    tokens: int = 96,
    passes: int = 1,
    clip: float | None = None,
) -> None:
    for index in steps:
        optimizer.zero_grad()
        for again in range(passes):
            x = torch.randn(tokens, 16, generator=torch.Generator().manual_seed(10 * index + again))
            (layer(x)[0] - x.roll(1, dims=1)).square().mean().backward()
        if clip is not None:
            clip_gradients(layer.parameters(), clip)
        optimizer.step()


@every_spec
def test_where_every_row_is_touched_both_ways_learn_the_same(spec) -> None:
    """Over several steps, with two backward passes in each and clipping at work."""
    ends = []
    for rows in ("dense", "row"):
        layer = peer()
        optimizer = spec(rows).build(layer.named_parameters())
        learn(layer, optimizer, range(6), tokens=400, passes=2, clip=0.01)
        assert layer.cohorts[0].u.by_rows == (rows == "row")
        ends.append(layer)
    for a, b in zip(ends[0].parameters(), ends[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("by_rows", [False, True])
@given(data=st.data())
def test_each_row_is_a_parameter_whose_steps_are_those_that_touch_it(by_rows: bool, data) -> None:
    """Against torch's Adam on every row alone; its state may have begun as that of a dense optimizer."""
    touched = data.draw(st.lists(st.sets(st.integers(0, 3), min_size=1), min_size=1, max_size=4))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    table = ExpertTable(torch.randn(4, 3))
    alone = [nn.Parameter(row.clone()) for row in table.detach()]
    theirs = [torch.optim.AdamW([row], lr=0.1, weight_decay=0.2, betas=(0.9, 0.95)) for row in alone]
    spec = AdamW(lr=0.1, weight_decay=0.2, rows="row" if by_rows else "auto")
    ours = spec.build([("u", table)])
    for rows in [*([set(range(4))] if by_rows else []), {0}, *touched]:
        grad = torch.randn(4, 3)
        row = torch.tensor(sorted(rows))
        table.grad = sparse_rows(row, grad[row], 4)
        ours.step()
        for i in rows:
            alone[i].grad = grad[i].clone()
            theirs[i].step()
    torch.testing.assert_close(
        table.detach(), torch.stack([row.detach() for row in alone]), atol=1e-6, rtol=1e-5
    )


@every_spec
def test_untouched_rows_keep_their_bits_and_their_memory(spec) -> None:
    layer = peer(1024)
    optimizer = spec("auto").build(layer.named_parameters())
    learn(layer, optimizer, range(1), tokens=4)
    table = layer.cohorts[0].u
    before, state = table.detach().clone(), copy.deepcopy(optimizer.state[table])
    learn(layer, optimizer, range(1, 2), tokens=4)
    touched, _ = row_gradient(table)
    assert 0 < len(touched) < 512
    rest = torch.ones(1024, dtype=torch.bool).index_fill(0, touched, False)
    assert torch.equal(table[rest], before[rest])
    assert not torch.equal(table[touched], before[touched])
    for key, value in optimizer.state[table].items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value[rest], state[key][rest])


@every_spec
def test_auto_asks_for_rows_where_few_are_touched_and_keeps_to_it(spec) -> None:
    """What the first step settled stands in the state, so that a restart goes on with the same bits."""
    for tokens, few in ((4, True), (400, False)):
        whole, cut = peer(1024 if few else 64), peer(1024 if few else 64)
        optimizer = spec("auto").build(whole.named_parameters())
        learn(whole, optimizer, range(1), tokens)
        learn(whole, optimizer, range(1, 4), 200)
        assert whole.cohorts[0].v.by_rows == few
        optimizer = spec("auto").build(cut.named_parameters())
        learn(cut, optimizer, range(1), tokens)
        state = state_by_name(optimizer, cut.named_parameters())
        assert all(isinstance(v, torch.Tensor | int | float) for of in state.values() for v in of.values())
        cut = copy.deepcopy(cut)
        optimizer = spec("auto").build(cut.named_parameters())
        load_state_by_name(optimizer, cut.named_parameters(), state)
        assert cut.cohorts[0].v.by_rows == few  # before a step: clipping adds up rows in another order
        learn(cut, optimizer, range(1, 4), 200)
        for a, b in zip(whole.parameters(), cut.parameters(), strict=True):
            assert torch.equal(a, b)


def test_frozen_cohorts_keep_their_bytes_and_cost_no_state() -> None:
    layer = peer(1024)
    layer.grow(1024)
    layer.freeze([0], shared=True)
    old = {name: value.clone() for name, value in layer.cohorts[0].state_dict().items()}
    optimizer = AdamW(lr=0.1, weight_decay=0.5).build(layer.named_parameters())
    learn(layer, optimizer, range(3), tokens=4)
    assert all(torch.equal(value, old[name]) for name, value in layer.cohorts[0].state_dict().items())
    assert set(optimizer.state) == set(layer.cohorts[1].parameters())


def test_a_dense_gradient_touches_every_row() -> None:
    """As when another term of the loss looks at the whole table."""
    layer, optimizers = peer(), []
    for rows in ("row", "dense"):
        layer = peer()
        optimizer = AdamW(lr=0.1, weight_decay=0.5, rows=rows).build(layer.named_parameters())
        (layer(torch.randn(4, 16, generator=torch.Generator().manual_seed(1)))[0]).sum().backward()
        layer.cohorts[0].u.square().sum().backward()
        assert not layer.cohorts[0].u.grad.is_sparse
        optimizer.step()
        optimizers.append(layer.cohorts[0].u)
    torch.testing.assert_close(*optimizers, atol=1e-6, rtol=1e-5)


def test_clipping_counts_a_row_once_and_leaves_small_gradients_alone() -> None:
    norms = []
    for rows in ("row", "dense"):
        layer = peer(1024)
        AdamW(lr=0.1, rows=rows).build(layer.named_parameters())
        for _ in range(2):
            layer(torch.ones(3, 16))[0].sum().backward()
        norms.append(clip_gradients(layer.parameters(), 1e9))
        before = [layer.cohorts[0].u.grad.to_dense().clone(), layer.query.bias.grad.clone()]
        clip_gradients(layer.parameters(), float(norms[-1]) / 2)
        for grad, old in zip(
            (layer.cohorts[0].u.grad.to_dense(), layer.query.bias.grad), before, strict=True
        ):
            torch.testing.assert_close(grad, old / 2)
    torch.testing.assert_close(*norms)


def test_a_state_that_was_kept_otherwise_is_refused() -> None:
    layer = peer(1024)
    optimizer = AdamW(lr=0.1, rows="row").build(layer.named_parameters())
    learn(layer, optimizer, range(1), tokens=4)
    state = state_by_name(optimizer, layer.named_parameters())
    other = AdamW(lr=0.1, rows="dense").build(layer.named_parameters())
    with pytest.raises(InputError, match=r"optimizer\.rows"):
        load_state_by_name(other, layer.named_parameters(), state)


@pytest.mark.parametrize("rows", ["auto", "dense", "row"])
def test_adagrad_goes_on_from_its_own_state_however_its_gradients_come(rows) -> None:
    whole, cut = peer(1024), peer(1024)
    for layer, carried in ((whole, False), (cut, True)):
        optimizer = Adagrad(lr=0.05, rows=rows, state="carry").build(layer.named_parameters())
        learn(layer, optimizer, range(1), tokens=4)
        if carried:
            state = state_by_name(optimizer, layer.named_parameters())
            optimizer = Adagrad(lr=0.05, rows=rows, state="carry").build(layer.named_parameters())
            load_state_by_name(optimizer, layer.named_parameters(), state)
        learn(layer, optimizer, range(1, 3), tokens=4)
        assert layer.cohorts[0].u.by_rows == (rows != "dense")
    for a, b in zip(whole.parameters(), cut.parameters(), strict=True):
        assert torch.equal(a, b)


def test_one_optimizer_holds_everything_and_its_state_dict_goes_round() -> None:
    layer = peer(1024)
    optimizer = AdamW(lr=0.1).build(layer.named_parameters())
    assert isinstance(optimizer, ByRows)
    assert {p for group in optimizer.param_groups for p in group["params"]} == set(layer.parameters())
    learn(layer, optimizer, range(2), tokens=4)
    twin = copy.deepcopy(layer)
    again = AdamW(lr=0.1).build(twin.named_parameters())
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for group in (*optimizer.param_groups, *again.param_groups):
        group["lr"] = 0.02  # a schedule reaches tables and the rest alike
    learn(layer, optimizer, range(2, 4), tokens=4)
    learn(twin, again, range(2, 4), tokens=4)
    for a, b in zip(layer.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("spec", [SGD, AdamW, Adagrad])
def test_an_unknown_policy_is_refused(spec: type) -> None:
    with pytest.raises(InputError, match=r"optimizer\.rows"):
        spec(lr=0.1, rows="some")
