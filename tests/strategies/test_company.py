"""Every strategy acts where it should, declares what it keeps, and goes with any other or is refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor
from torch.utils.data import TensorDataset

import conf
from cl_moe.errors import InputError
from cl_moe.growth import EveryExperience, GrowthSchedule
from cl_moe.layers import PEER
from cl_moe.learner import Learner
from cl_moe.models import ContinualModel, PatchTransformer
from cl_moe.optim import SGD
from cl_moe.preflight import training_view
from cl_moe.seeds import seeded
from cl_moe.strategies import DistillFrom, Strategy, agem, gem
from cl_moe.strategies.base import Outlook, tensor_bytes
from cl_moe.strategies.passes import learning, memory_gradient
from cl_moe.stream import Stream

LAYER = partial(PEER, num_experts=16, heads=2, k=4, key_dim=8)
NAMES = sorted(path.stem for path in Path(conf.__path__[0], "strategy").glob("*.yaml"))
SMALL: dict[str, dict[str, Any]] = {
    **{n: {"memory_size": 12} for n in ("replay", "der", "gem", "gdumb", "icarl", "bic", "latent_replay")},
    **{name: {"memory_size": 12, "sample_size": 8} for name in ("agem", "router_replay")},
    "continual_backprop": {"rate": 0.05, "maturity": 1},
    "l2p": {"pool_size": 4, "length": 2, "top_n": 2},
    "sparse_memory": {"top_t": 3, "num_background": 4, "background_size": 8},
}
AT_ONCE = (
    "bic",
    "continual_backprop",
    "der",
    "distill_from",
    "gdumb",
    "icarl",
    "joint",
    "locality",
    "rewarming",
)
"""Act in the first experience already: on its data, its loss, its rate or its weights."""
HOMES = {"continual_backprop": "dense", "l2p": "patches", "demix": "domains", "sparse_memory": "peer"}
"""The layers, or the stream, of those that are not at home with every mixture."""
GO_TOGETHER = (
    *(
        ("lwf", "replay"),
        ("bic", "lwf"),
        ("bic", "replay"),
        ("replay", "weight_aligning"),
        ("icarl", "replay"),
    ),
    *(
        ("distill_from", "joint"),
        ("distill_from", "replay"),
        ("replay", "rewarming"),
        ("replay", "shrink_perturb"),
    ),
    *(
        ("agem", "sparse_memory"),
        ("der", "l2p"),
        ("demix", "shrink_perturb"),
        ("lifelong_moe", "router_replay"),
    ),
)
Parts = tuple[ContinualModel, Stream, GrowthSchedule | None]


@pytest.fixture
def parts(
    new_stream: Callable[..., Stream], new_model: Callable[..., ContinualModel]
) -> Callable[..., Parts]:
    """``parts("moe")``: a model, a stream, and a schedule where there has to be one."""

    def build(home: str) -> Parts:
        if home == "domains":
            return new_model("moe"), new_stream("task"), EveryExperience(4, init="copy", noise=0.1)
        if home != "patches":
            return new_model(home), new_stream(), None
        stream = new_stream()
        squares = tuple(replace(e, train=_square(e.train), test=_square(e.test)) for e in stream)
        with seeded(0, "init"):
            model = PatchTransformer((16,), 6, LAYER, width=8, num_heads=2, ffn_hidden=12)
        return model, replace(stream, experiences=squares, input_shape=(16,)), None

    return build


def _square(data: TensorDataset) -> TensorDataset:
    return TensorDataset(F.pad(data.tensors[0], (0, 10)), data.tensors[1])


@lru_cache
def _node(name: str) -> Any:
    node = OmegaConf.load(Path(conf.__path__[0], "strategy", f"{name}.yaml"))
    return OmegaConf.merge(node, {"seed": 0} if "seed" in node else {}, SMALL.get(name, {}))


def strategies_of(names: Sequence[str], parts: Callable[..., Parts], home: str) -> dict[str, Strategy]:
    """As their YAMLs have them, in small."""
    made: dict[str, Strategy] = {name: instantiate(_node(name)) for name in names}
    for strategy in made.values():
        if isinstance(strategy, DistillFrom):
            teacher = parts(home)[0]
            teacher.head.grow(list(range(6)))
            strategy.learn_from(teacher)
    return made


def home_of(names: Sequence[str]) -> str:
    return next((HOMES[name] for name in names if name in HOMES), "moe")


def trained(
    names: Sequence[str], home: str, parts: Callable[..., Parts], walk: Any
) -> tuple[list[Tensor], dict[str, Strategy], Stream]:
    """All weights after each experience; the strategies; the stream as trained on."""
    model, stream, schedule = parts(home)
    strategies = strategies_of(names, parts, home)
    view = training_view(stream, strategies)
    weights = [
        torch.cat([p.detach().flatten() for p in learner.model.parameters()])
        for moment, learner in walk(model, view, strategies, schedule, lr=0.05)
        if moment == "trained"
    ]
    return weights, strategies, view


@pytest.fixture(scope="module")
def alone() -> dict[tuple[str, str], Tensor]:
    """Weights at the end, by strategy and home: runs that several tests compare with."""
    return {}


@pytest.mark.parametrize("name", [name for name in NAMES if name != "naive"])
def test_it_acts_where_it_should_and_declares_what_it_keeps(
    name: str, parts: Callable[..., Parts], walk: Any
) -> None:
    """Weights are those of plain fine-tuning till there is a past; bytes are those of its state."""
    home = home_of((name,))
    plain, _, _ = trained(("naive",), home, parts, walk)
    found, strategies, view = trained((name,), home, parts, walk)
    assert torch.equal(found[0], plain[0]) == (name not in AT_ONCE)
    assert (found[-1] - plain[-1]).abs().max() > 1e-4
    strategy = strategies[name]
    assert strategy.needs_past == (name not in AT_ONCE or name == "bic")
    kept = tensor_bytes(*(t for t in _tensors(strategy.state_dict()) if t.dtype != torch.uint8))
    if name in ("joint", "cumulative", "gdumb"):  # data that their view brings
        kept += tensor_bytes(*[e for e in view if len(e.train)][-1].train.tensors)
    if isinstance(strategy, DistillFrom):
        assert strategy.teacher is not None
        kept += tensor_bytes(*strategy.teacher.state_dict().values())
    assert strategy.buffer_bytes == kept
    nothing = ("demix", "rewarming", "router_freezing", "shrink_perturb", "weight_aligning")
    assert (kept == 0) == (name in nothing)


def _tensors(state: Any) -> Iterator[Tensor]:
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, dict | list | tuple):
        for value in state.values() if isinstance(state, dict) else state:
            yield from _tensors(value)


@pytest.fixture
def refusal(parts: Callable[..., Parts]) -> Callable[..., InputError | None]:
    """Why a run of these strategies is refused before any training, if it is."""
    homes = {home: parts(home) for home in ("dense", "moe", "peer", "domains")}

    def refused(names: Sequence[str]) -> InputError | None:
        home = home_of(names)
        model, stream, _ = parts(home) if home == "patches" else homes[home]  # prompts change the model
        strategies = strategies_of(names, parts, home)
        try:
            Learner(model, SGD(lr=0.1), strategies, stream)
            training_view(stream, strategies)
        except InputError as error:
            return error
        return None

    return refused


def test_any_two_are_made_or_refused_by_name(refusal: Callable[..., InputError | None]) -> None:
    found = {pair: (refusal(pair), refusal(pair[::-1])) for pair in itertools.combinations(NAMES, 2)}
    for pair, (error, reversed_) in found.items():
        assert (error is None) == (reversed_ is None), f"{pair}: the order of the list decides"
        if error is not None:
            text = f"{error.got} {error.allowed}"
            assert all(name in text for name in pair) or "with" in error.got, (pair, str(error))
            assert error.key.startswith(("strategy", "layer", "stream", "model"))
    assert {pair for pair in GO_TOGETHER if found[pair][0]} == set()
    assert not [pair for pair, errors in found.items() if "naive" in pair and errors[0]]


@pytest.fixture
def bends(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of every look back of GEM and A-GEM, whether the step pointed away from what is kept."""
    found: list[bool] = []

    def looking(outlook: Outlook, *arguments: Any) -> dict[str, Tensor]:
        past = memory_gradient(outlook, *arguments)
        steps = {name: p.grad for name, p in learning(outlook.model).items() if p.grad is not None}
        found.append(sum(float((steps[n].double() * g.double()).sum()) for n, g in past.items()) < 0)
        return past

    for module in (agem, gem):
        monkeypatch.setattr(module, "memory_gradient", looking)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "pair", list(itertools.combinations([n for n in NAMES if n != "naive"], 2)), ids="+".join
)
def test_neither_of_two_is_silent(
    pair: tuple[str, str], refusal: Any, parts: Any, walk: Any, alone: dict[Any, Tensor], bends: list[bool]
) -> None:
    """What is not refused trains, ends with finite weights, and with others than either alone.

    GEM and A-GEM may find nothing to mend: beside iCaRL, which trains on the same past, no step points away.
    """
    if refusal(pair) is not None:
        return
    home = home_of(pair)
    both = trained(pair, home, parts, walk)[0][-1]
    assert both.isfinite().all()
    content = "icarl" in pair and bool(bends) and not any(bends)
    for name in pair:
        if (name, home) not in alone:
            alone[name, home] = trained((name,), home, parts, walk)[0][-1]
        if content and name == "icarl":
            assert torch.equal(both, alone[name, home])
            continue
        assert not torch.equal(both, alone[name, home]), f"beside {name} the other does nothing"
