"""Two and three ranks that own the experts compute what one process does: outputs, gradients, bytes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from cl_moe.layers import PEER, PKM, MoE, Retrieval, Switch
from cl_moe.layers.exchange import Exchange, gathered, owned, spread
from cl_moe.layers.expert_layer import ExpertLayer
from tests import company

DIM = 16


def mixture() -> ExpertLayer:
    """Cohorts of other widths, of fewer experts than ranks, frozen; experts that do nothing."""
    layer = MoE(DIM, 5, hidden=8, num_noops=2, num_shared=1)
    layer.grow(3, hidden=12)
    layer.freeze([1])
    layer.grow(1)
    return layer


def retrieved() -> ExpertLayer:
    layer = PEER(DIM, 25, heads=2, k=3, glu=True, query_norm="none")
    layer.grow(9)
    layer.freeze([0])
    layer.grow(4)
    return layer


LAYERS: dict[str, Callable[[], ExpertLayer]] = {
    "mixture": mixture,
    "dropping": lambda: MoE(
        DIM, 4, hidden=8, router=Switch(DIM, jitter=0.0, capacity_factor=0.5, min_capacity=1)
    ),
    "peer": retrieved,
    "memory": lambda: PKM(DIM, 16, heads=1, k=2, query_norm="none"),
    "added": lambda: PEER(DIM, 9, heads=2, k=2, query_norm="none", retrieval=Retrieval(policy="sum")),
}


def loss_of(layer: ExpertLayer, x: Tensor, weight: Tensor) -> Tensor:
    return (layer(x)[0] * weight).sum()


def compute(
    layer: ExpertLayer, x: Tensor, weight: Tensor, parts: list[slice], by_rows: bool, out: Path
) -> None:
    """A rank's part: its tokens, its experts."""
    exchange = Exchange()
    spread(layer, exchange)
    for parameter in layer.parameters():
        if hasattr(parameter, "by_rows"):
            parameter.by_rows = by_rows  # type: ignore[attr-defined]
    part = parts[exchange.rank]
    x_own = x[part].clone().requires_grad_()
    loss = loss_of(layer, x_own, weight[part])
    loss.backward()
    left: dict[str, Tensor] = {"loss": loss.detach(), "x": x_own.grad, "sent": torch.tensor(exchange.sent)}
    for number, cohort in enumerate(layer.cohorts):
        for name, parameter in cohort.named_parameters():
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.to_dense()
            assert parameter.grad is None or parameter.requires_grad
            if name in owned(cohort):
                assert parameter.grad is None or parameter.grad.is_sparse == by_rows
                num = cohort.num_computing if hasattr(cohort, "num_computing") else cohort.num_experts
                grad = gathered(grad, num, exchange)
            else:
                dist.all_reduce(grad)
            left[f"{number}.{name}"] = grad
    torch.save(left, out / f"left_{exchange.rank}.pt")


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", LAYERS)
def test_ranks_that_own_experts_compute_what_one_process_does(tmp_path, name, size):
    torch.manual_seed(0)
    layer = LAYERS[name]().double()
    x, weight = torch.randn(2, 23, 4, DIM, dtype=torch.float64)  # sequences, since capacities are theirs
    parts = [slice(0, 9), slice(9, 23), slice(23, 23)][:size]  # the third rank has no token
    alone, by_rows = copy.deepcopy(layer), name in ("memory", "added")
    x_own = x.clone().requires_grad_()
    losses = torch.stack([loss_of(alone, x_own[part], weight[part]) for part in parts])
    losses.sum().backward()
    company.among(size, compute, layer, x, weight, parts, by_rows, tmp_path, folder=tmp_path)
    left = company.results(tmp_path, size)
    torch.testing.assert_close(torch.stack([one.pop("loss") for one in left]), losses.detach())
    torch.testing.assert_close(torch.cat([one.pop("x") for one in left]), x_own.grad)
    assert all(sent > 0 for sent in [one.pop("sent") for one in left])
    for one in left:
        for key, grad in one.items():
            whole = alone.cohorts.get_parameter(key)
            expected = torch.zeros_like(whole) if whole.grad is None else whole.grad
            torch.testing.assert_close(grad, expected, msg=key)


def test_parts_cover_every_expert_once():
    exchange = object.__new__(Exchange)
    for exchange.size in (1, 2, 3, 5):
        for num in (1, 2, 5, 12):
            ids = [i for rank in range(exchange.size) for i in exchange.own(num, rank)]
            assert ids == list(range(num))
        place_E = exchange.order([5, 2], torch.device("cpu"))
        by_owner = place_E.argsort().tolist()
        owners = [
            next(
                r
                for r in range(exchange.size)
                if (e if e < 5 else e - 5) in exchange.own(5 if e < 5 else 2, r)
            )
            for e in by_owner
        ]
        assert owners == sorted(owners)
