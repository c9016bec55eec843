"""A part of a parameter that begins anew steps as a parameter of its own would that had just been born."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cl_moe.optim import SGD, Adagrad, AdamW, OptimizerSpec, forget_part, load_state_by_name, state_by_name

SPECS = [AdamW(0.01), AdamW(0.01, betas=(0.9, 0.999), eps=1e-3), SGD(0.01, momentum=0.9), Adagrad(0.01)]
SHAPE, PART, RENEWED = (5, 4), (slice(None), [1, 3]), 40


def steps(spec: OptimizerSpec, parameter: nn.Parameter, slopes: Tensor, at: dict[int, Any]) -> list[Tensor]:
    """The parameter after each step; before step i what ``at[i]`` does happens to parameter and optimizer."""
    optimizer, found = spec.build([("weight", parameter)]), []
    for i, slope in enumerate(slopes):
        if i in at:
            optimizer = at[i](parameter, optimizer) or optimizer
        parameter.grad = slope.clone()
        optimizer.step()
        found.append(parameter.detach().clone())
    return found


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: type(s).__name__)
def test_the_part_is_as_if_just_born_and_the_rest_as_if_nothing_was(spec: OptimizerSpec) -> None:
    draw = torch.Generator().manual_seed(0)
    first, fresh = torch.randn(SHAPE, generator=draw), torch.randn(5, 2, generator=draw)
    slopes = torch.randn((80, *SHAPE), generator=draw) * torch.logspace(1, -2, 80).reshape(-1, 1, 1)

    def renew(parameter: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
        with torch.no_grad():
            parameter[PART] = fresh
        forget_part(optimizer.state[parameter], parameter.shape, PART)

    def restart(parameter: nn.Parameter, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        again = spec.build([("weight", parameter)])
        load_state_by_name(again, [("weight", parameter)], state_by_name(optimizer, [("weight", parameter)]))
        return again

    found = steps(spec, nn.Parameter(first.clone()), slopes, {RENEWED: renew})
    restarted = steps(spec, nn.Parameter(first.clone()), slopes, {RENEWED: renew, RENEWED + 3: restart})
    plain = steps(spec, nn.Parameter(first.clone()), slopes, {})
    alone = steps(spec, nn.Parameter(fresh.clone()), slopes[RENEWED:][:, *PART], {})
    for i in range(len(slopes)):
        assert torch.equal(found[i][:, [0, 2]], plain[i][:, [0, 2]])
        assert torch.equal(found[i], restarted[i])
    for own, part in zip(alone, found[RENEWED:], strict=True):
        torch.testing.assert_close(part[PART], own, rtol=1e-5, atol=1e-6)


def test_what_has_grown_old_is_counted_no_more() -> None:
    parameter, spec = nn.Parameter(torch.ones(3)), AdamW(0.01, betas=(0.5, 0.5))
    optimizer = spec.build([("weight", parameter)])
    for step in range(40):
        if step == 5:
            forget_part(optimizer.state[parameter], parameter.shape, [1])
        assert ("born" in optimizer.state[parameter]) == (5 <= step < 25)
        parameter.grad = torch.ones(3)
        optimizer.step()
