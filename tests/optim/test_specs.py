"""Optimizers built anew per experience: who is in, whose state goes on, what is refused."""

import pytest
import torch
from torch import nn

from cl_moe.errors import InputError
from cl_moe.layers import PEER, MoE
from cl_moe.optim import SGD, Adagrad, AdamW, OptimizerSpec, load_state_by_name, state_by_name
from cl_moe.optim.state import begin_anew


def net() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"old": nn.Linear(3, 3), "frozen": nn.Linear(3, 3).requires_grad_(False)})


def step(model: nn.Module, optimizer: torch.optim.Optimizer, factor: float = 1.0) -> None:
    optimizer.zero_grad()
    sum((p * p).sum() * factor for p in model.parameters() if p.requires_grad).backward()
    optimizer.step()


SPECS = {
    "sgd": SGD(lr=0.1, momentum=0.9, state="carry"),
    "adamw": AdamW(lr=0.1, weight_decay=0.1, state="carry"),
    "adagrad": Adagrad(lr=0.1, state="carry"),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_only_what_learns_is_held(spec: OptimizerSpec) -> None:
    model = net()
    held = [p for group in spec.build(model.named_parameters()).param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in model["old"].parameters()}
    assert len(held) == 2


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_carried_state_equals_an_optimizer_that_never_stopped(spec: OptimizerSpec) -> None:
    """An optimizer rebuilt at a boundary, with its state by name, goes on bit for bit."""
    whole, cut = net(), net()
    optimizer = spec.build(whole.named_parameters())
    for factor in (1.0, 2.0, 3.0, 4.0):
        step(whole, optimizer, factor)
    optimizer = spec.build(cut.named_parameters())
    step(cut, optimizer, 1.0)
    step(cut, optimizer, 2.0)
    state = state_by_name(optimizer, cut.named_parameters())
    optimizer = spec.build(cut.named_parameters())
    load_state_by_name(optimizer, cut.named_parameters(), state)
    step(cut, optimizer, 3.0)
    step(cut, optimizer, 4.0)
    for a, b in zip(whole.parameters(), cut.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_state_follows_names_over_growth_and_freezing(spec: OptimizerSpec) -> None:
    model = nn.ModuleDict({"leaving": nn.Linear(2, 2), "old": nn.Linear(3, 3)})
    optimizer = spec.build(model.named_parameters())
    step(model, optimizer)
    state = state_by_name(optimizer, model.named_parameters())
    assert set(state) == {name for name, _ in model.named_parameters()}
    model["leaving"].requires_grad_(False)
    # the newborn comes first in the order of parameters: positions move, names do not
    model = nn.ModuleDict({"newborn": nn.Linear(3, 3), "leaving": model["leaving"], "old": model["old"]})
    optimizer = spec.build(model.named_parameters())
    load_state_by_name(optimizer, model.named_parameters(), state)
    now = state_by_name(optimizer, model.named_parameters())
    assert "leaving.weight" not in now
    for name in ("newborn.weight", "newborn.bias"):  # fresh: without a state, or with an empty one
        assert not any(torch.as_tensor(value).any() for value in now.get(name, {}).values())
    for name in ("old.weight", "old.bias"):
        values = now[name]
        assert values.keys() == state[name].keys()
        for key, value in values.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(state[name][key])), (name, key)
    step(model, optimizer)
    assert "newborn.weight" in state_by_name(optimizer, model.named_parameters())


def test_loaded_state_is_not_shared() -> None:
    model, spec = net(), SPECS["sgd"]
    optimizer = spec.build(model.named_parameters())
    step(model, optimizer)
    state = state_by_name(optimizer, model.named_parameters())
    kept = {name: values["momentum_buffer"].clone() for name, values in state.items()}
    later = spec.build(model.named_parameters())
    load_state_by_name(later, model.named_parameters(), state)
    step(model, later)
    assert all(torch.equal(state[name]["momentum_buffer"], kept[name]) for name in kept)


def test_state_by_name_is_plain() -> None:
    """Tensors and numbers only, so that it goes into a checkpoint that loads with weights_only."""
    model = net()
    for spec in SPECS.values():
        optimizer = spec.build(model.named_parameters())
        step(model, optimizer)
        for values in state_by_name(optimizer, model.named_parameters()).values():
            assert all(isinstance(value, torch.Tensor | int | float) for value in values.values())


def test_adamw_decays_matrices_and_nothing_else() -> None:
    """Without a gradient that matters, decay alone moves a parameter: biases of experts are no matrices."""
    model = nn.ModuleDict(
        {
            "dense": nn.Linear(4, 4),
            "norm": nn.LayerNorm(4),
            "moe": MoE(4, num_experts=2, hidden=8),
            "peer": PEER(4, num_experts=4, heads=1, k=2, key_dim=4),
        }
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    optimizer = AdamW(lr=0.5, weight_decay=0.1).build(model.named_parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    decayed = {name for name, p in model.named_parameters() if torch.allclose(p, torch.tensor(0.95))}
    still = {name for name, p in model.named_parameters() if torch.equal(p, torch.ones_like(p))}
    assert decayed | still == {name for name, _ in model.named_parameters()}
    assert still == {
        name
        for name, _ in model.named_parameters()
        if name.rsplit(".", 1)[1] in ("bias", "b_in", "b_out") or "norm" in name
    }


@pytest.mark.parametrize("lr", [0, -0.1, float("nan"), "0.1", None])
@pytest.mark.parametrize("spec", [SGD, AdamW, Adagrad])
def test_a_rate_that_is_no_rate_is_refused(spec: type, lr: object) -> None:
    with pytest.raises(InputError) as caught:
        spec(lr=lr)
    assert caught.value.key == "optimizer.lr"


@pytest.mark.parametrize("spec", [SGD, AdamW, Adagrad])
def test_an_unknown_state_policy_is_refused(spec: type) -> None:
    with pytest.raises(InputError) as caught:
        spec(lr=0.1, state="keep")
    assert caught.value.key == "optimizer.state"
    assert "carry" in caught.value.allowed
    assert "reset" in caught.value.allowed


def test_a_gradient_that_comes_later_is_no_trouble() -> None:
    """A part that took no part in the first step starts its momentum when it does."""
    model, spec = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}), SPECS["sgd"]
    optimizer, start = spec.build(model.named_parameters()), model["b"].weight.detach().clone()
    model["a"].weight.sum().backward()
    optimizer.step()
    model["b"].weight.sum().backward()
    optimizer.step()
    torch.testing.assert_close(model["b"].weight, start - 0.1)


def test_sgd_is_torchs() -> None:
    ours, theirs = net()["old"], net()["old"]
    first = SGD(lr=0.1, momentum=0.9, weight_decay=0.01).build(ours.named_parameters())
    second = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    for _ in range(3):
        step(ours, first)
        step(theirs, second)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("rows", [[0], [0, 2], [0, 1, 2]])
def test_rows_that_begin_anew_take_no_longer_steps_than_a_young_parameter(rows: list[int]) -> None:
    table = torch.nn.Parameter(torch.zeros(3, 4))
    optimizer = AdamW(lr=0.1, weight_decay=0.0).build([("table", table)])

    def step() -> torch.Tensor:
        before = table.detach().clone()
        table.grad = torch.randn(3, 4, generator=drawn)
        optimizer.step()
        return (table.detach() - before).abs()

    drawn = torch.Generator().manual_seed(0)
    for _ in range(300):
        step()
    state = state_by_name(optimizer, [("table", table)])
    old = {key: value.clone() for key, value in state["table"].items()}
    begin_anew(state, "table", table.shape, rows)
    others = [row for row in range(3) if row not in rows]
    for key, value in state.get("table", {}).items():
        assert (
            torch.equal(value, old[key]) if value.dim() == 0 else torch.equal(value[others], old[key][others])
        )
    optimizer.state.clear()
    load_state_by_name(optimizer, [("table", table)], state)
    assert ("table" in state) == bool(others)
    largest = max(step()[rows].max().item() for _ in range(5))
    assert largest <= 0.1 * 1.6, "with squares of 0 the first is three times the rate"
