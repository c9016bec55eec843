"""Locality: the router's step after each experience, against its two losses written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cl_moe.errors import InputError
from cl_moe.strategies import Locality, RouterFreezing
from cl_moe.strategies.base import Outlook
from cl_moe.strategies.passes import quiet


def keys_of(model) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if name.endswith(".key")}


def weights_of(model, i: int) -> list[Tensor]:
    """(n, all) of each cohort of a layer."""
    cohorts = model.expert_layers[i].cohorts
    named = [[p for n, p in c.named_parameters() if n != "key"] for c in cohorts]
    return [torch.cat([p.detach().flatten(1) for p in held], dim=1).clone() for held in named]


def by_hand(
    outlook: Outlook, was: dict[int, list[Tensor]], past: dict[int, list[Tensor]], alpha: float
) -> Tensor:
    """Both losses of all layers as they stand in the paper, differentiable in the keys.

    ``past``: of each layer the shares of choices and the mean probabilities of the experiences before.
    """
    inputs, _ = outlook.experience.train[torch.arange(len(outlook.experience.train))]
    total = torch.zeros(())
    with quiet(outlook.model):
        _, routings = outlook.model(inputs)
    for i, routing in routings.items():
        now = weights_of(outlook.model, i)
        moved_N = torch.cat([(a - b).norm(dim=1) for a, b in zip(now, was[i], strict=True)])
        pi_TN = routing.scores.softmax(dim=1)
        share_N = torch.bincount(routing.expert.flatten(), minlength=len(moved_N)) / routing.expert.numel()
        past[i].append((share_N, pi_TN.mean(dim=0)))
        f_N, p_N = (
            torch.stack([nn.functional.pad(part, (0, len(moved_N) - len(part))) for part in parts]).mean(
                dim=0
            )
            for parts in zip(*past[i], strict=True)
        )
        total = total + (pi_TN @ moved_N).mean() + alpha * len(moved_N) * (f_N * p_N).sum()
        past[i][-1] = (share_N, pi_TN.mean(dim=0).detach())
    return total


@pytest.mark.parametrize("balance", [0.0, 0.7])
def test_the_router_descends_on_the_two_losses(walk, new_model, new_stream, growing, balance: float) -> None:
    strategy = Locality(lr=0.3, balance=balance, experiences=2)
    model = new_model("moe")
    was: dict[int, list[Tensor]] = {}
    past: dict[int, list] = {i: [] for i in model.expert_layers}
    taught, before, end = [], {}, strategy.end

    def held_end(outlook: Outlook) -> None:
        before.update(keys_of(outlook.model))
        loss = by_hand(outlook, was, past, balance)
        live = {n: p for n, p in outlook.model.named_parameters() if n in before and p.requires_grad}
        slopes = torch.autograd.grad(loss, list(live.values()))
        expected = before | {n: before[n] - 0.3 * s for n, s in zip(live, slopes, strict=True)}
        end(outlook)
        learns = outlook.experience.index < 2
        taught.append(learns)
        for name, key in keys_of(outlook.model).items():
            torch.testing.assert_close(key, expected[name] if learns else before[name])
            assert name not in live or learns != torch.equal(key, before[name])

    strategy.end = held_end  # type: ignore[method-assign]
    for moment, learner in walk(model, new_stream(), {"s": strategy}, growing["moe"]):
        if moment == "adapted":
            was = {i: weights_of(learner.model, i) for i in learner.model.expert_layers}
    assert taught[:3] == [True, True, False]


def test_what_it_remembers_comes_back(walk, new_model, new_stream) -> None:
    strategy = Locality()
    list(walk(new_model("moe"), new_stream(), {"s": strategy}))
    strategy.start = {"0.0.w_in": torch.ones(2)}
    other = Locality()
    other.load_state_dict(strategy.state_dict())
    assert other.taught == strategy.taught > 0
    assert {i: s.tolist() for i, s in other.shares.items()} == {
        i: s.tolist() for i, s in strategy.shares.items()
    }
    assert other.buffer_bytes == strategy.buffer_bytes > 8
    other.shares[next(iter(other.shares))] += 1
    assert not torch.equal(next(iter(other.shares.values())), next(iter(strategy.shares.values())))


def test_what_it_cannot_serve_is_refused(train, new_model, new_stream) -> None:
    for layer in ("dense", "peer"):
        with pytest.raises(InputError, match="do not score every expert"):
            train(new_model(layer), new_stream(), {"s": Locality()})
    with pytest.raises(InputError, match="stops gradients alone"):
        train(new_model("moe"), new_stream(), {"locality": Locality(), "router_freezing": RouterFreezing()})
    for options, key in (
        ({"lr": 0}, "lr"),
        ({"balance": -1}, "balance"),
        ({"experiences": 1.5}, "experiences"),
    ):
        with pytest.raises(InputError, match=rf"strategy\.locality\.{key}"):
            Locality(**options)
