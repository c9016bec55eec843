"""Strategies on a stream of numbers: which serve it, which refuse it, and what those that serve compute."""

from __future__ import annotations

import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

from cl_moe import checkpoint
from cl_moe.errors import InputError
from cl_moe.experiment import run_experiment
from cl_moe.learner import Learner
from cl_moe.optim import SGD
from cl_moe.run import Run
from cl_moe.seeds import generator
from cl_moe.strategies import (
    AGEM,
    DER,
    EWC,
    GEM,
    L2P,
    MAS,
    SI,
    BiC,
    ContinualBackprop,
    Cumulative,
    DEMix,
    DistillFrom,
    GDumb,
    ICaRL,
    Joint,
    LatentReplay,
    LifelongMoE,
    Locality,
    LwF,
    Naive,
    Outlook,
    Replay,
    Rewarming,
    RouterFreezing,
    RouterReplay,
    ShrinkPerturb,
    SparseMemory,
    Step,
    Strategy,
    WeightAligning,
)
from cl_moe.strategies.passes import loss_of
from cl_moe.stream import IGNORE, Experience, Stream
from cl_moe.tracking.names import stream_points
from tests.number_runs import Numbers, numbers, run_of

differences = runpy.run_path(str(Path(__file__).parents[1] / "chaos.py"))["differences"]
pytestmark = pytest.mark.usefixtures("no_drawing")

SERVE: dict[str, tuple[Callable[[], Strategy], str]] = {
    "agem": (lambda: AGEM(40, sample_size=16), "dense"),
    "continual_backprop": (lambda: ContinualBackprop(rate=0.05, maturity=1), "dense"),
    "cumulative": (Cumulative, "dense"),
    "der": (lambda: DER(40), "dense"),
    "der at the end": (lambda: DER(40, keep="end"), "moe"),
    "gem": (lambda: GEM(40), "dense"),
    "joint": (Joint, "dense"),
    "latent_replay": (lambda: LatentReplay(40), "dense"),
    "locality": (Locality, "moe"),
    "mas": (lambda: MAS(0.05), "moe"),
    "replay": (lambda: Replay(40), "dense"),
    "rewarming": (lambda: Rewarming(warmup=0.5, peak=0.5), "dense"),
    "router_freezing": (RouterFreezing, "moe"),
    "router_replay": (lambda: RouterReplay(40), "moe"),
    "shrink_perturb": (ShrinkPerturb, "dense"),
    "si": (lambda: SI(1.0), "dense"),
    "sparse_memory": (lambda: SparseMemory(top_t=4, num_background=4), "peer"),
}
REFUSE: dict[str, Callable[[], Strategy]] = {
    "bic": BiC,
    "demix": DEMix,
    "distill_from": DistillFrom,
    "ewc": EWC,
    "gdumb": GDumb,
    "icarl": ICaRL,
    "l2p": L2P,
    "lifelong_moe": LifelongMoE,
    "lwf": LwF,
    "replay": lambda: Replay(policy="balanced"),
    "replay of herds": lambda: Replay(policy="herding"),
    "weight_aligning": WeightAligning,
}


def finished(folder: Path, name: str, **options: Any) -> Run:
    make, layer = SERVE.get(name, (Naive, "dense"))
    run = run_of(folder, {name.split()[0]: make()}, **({"layer": layer} | options))
    run_experiment(run)
    return run


def test_every_strategy_is_asked_here() -> None:
    import conf

    known = {path.stem for path in Path(conf.__path__[0], "strategy").glob("*.yaml")}
    assert {name.split()[0] for name in (*SERVE, *REFUSE)} >= known - {"naive"}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """The run of plain training, of each layer."""
    runs: dict[str, Run] = {}

    def ran(layer: str) -> Run:
        if layer not in runs:
            runs[layer] = finished(tmp_path_factory.mktemp("plain"), "naive", layer=layer)
        return runs[layer]

    return ran


@pytest.mark.parametrize("name", SERVE)
def test_it_serves_numbers_and_makes_a_difference(name: str, plain, tmp_path: Path) -> None:
    run, other = finished(tmp_path, name), plain(SERVE[name][1])
    assert run.measured.matrix.shape == (4, 3)
    assert run.measured.matrix.isfinite().all()
    assert not torch.equal(run.measured.matrix[-1], other.measured.matrix[-1])
    if name in ("agem", "cumulative", "der", "gem", "joint", "latent_replay", "replay"):
        found, base = (stream_points(one.measured, 3)["stream/forgetting"] for one in (run, other))
        assert found < base


@pytest.mark.parametrize("name", ["mas", "si"])
def test_what_is_held_with_more_strength_forgets_less(name: str, plain, tmp_path: Path) -> None:
    make = {"mas": lambda: MAS(0.2), "si": lambda: SI(1.0)}[name]
    run = run_of(tmp_path, {name: make()})
    run_experiment(run)
    held, free = (stream_points(one.measured, 3)["stream/forgetting"] for one in (run, plain("dense")))
    assert held < free


@pytest.mark.parametrize("name", REFUSE)
def test_it_refuses_numbers(name: str) -> None:
    with pytest.raises(InputError) as refused:
        Learner(Numbers((4,), 0, "moe"), SGD(lr=0.1), {name.split()[0]: REFUSE[name]()}, numbers())
    assert name.split()[0] in refused.value.got
    assert "strategy" in refused.value.key


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("der", "gem", "si") else pytest.param(name, marks=pytest.mark.slow)
        for name in SERVE
        if name != "joint"  # which trains in the first experience only
    ],
)
def test_interrupted_equals_uninterrupted(name: str, tmp_path: Path, monkeypatch) -> None:
    copies, save = [], checkpoint.Checkpoints.save

    def copying(self: Any, saved_in: Path, moment: Any, *rest: Any) -> Path:
        written = save(self, saved_in, moment, *rest)
        copies.append(Path(shutil.copy(written, tmp_path)))
        return written

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Checkpoints, "save", copying)
        finished(tmp_path / "through", name, every_steps=3)
    copy = [copy for copy in copies if copy.name.startswith("boundary_001_batch")][-1]
    (tmp_path / "again/checkpoints").mkdir(parents=True)
    shutil.copy(copy, tmp_path / "again/checkpoints")
    finished(tmp_path / "again", name, every_steps=3)
    one, two = (checkpoint.newest(tmp_path / part / "checkpoints") for part in ("again", "through"))
    assert one is not None
    assert two is not None
    for state in (one, two):
        del state["cost"]["clock"]
    assert differences(one, two) == []


def of_sequences(rows: int = 12) -> Stream:
    """An experience of (n, 3, 4) inputs and (n, 3, 2) targets."""
    inputs = torch.randn(rows, 3, 4, generator=generator(0, "inputs"))
    data = TensorDataset(inputs, torch.randn(rows, 3, 2, generator=generator(0, "targets")))
    return Stream("rows", "regression", "domain", (Experience(0, "one", data, data),), 0, (3, 4))


@pytest.fixture
def outlook() -> Outlook:
    stream = of_sequences()
    torch.manual_seed(0)
    learner = Learner(Numbers((3, 4), 0, targets=2), SGD(lr=0.1), {}, stream)
    learner.experience = stream[0]
    learner.place_classes()
    return learner.outlook()


def test_mas_takes_the_squared_norm_of_all_of_an_examples_numbers(outlook: Outlook) -> None:
    mas, model = MAS(), outlook.model
    mas.end(outlook)
    wanted = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for row in outlook.experience.train.tensors[0]:
        model.zero_grad()
        model(row[None])[0].square().sum().backward()
        for name, parameter in model.named_parameters():
            wanted[name] += parameter.grad.abs() / 12  # type: ignore[union-attr]
    assert mas.anchors.importance.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(mas.anchors.importance[name], value)


def test_der_holds_the_numbers_themselves(outlook: Outlook) -> None:
    der, (inputs, targets) = DER(memory_size=20, alpha=0.7, beta=0.4), outlook.experience.train.tensors
    targets = targets.clone()
    targets[:4] = IGNORE  # numbers like any other
    der.begin(outlook)

    def step() -> Step:
        answers = outlook.model(inputs)[0]
        return Step(outlook.model, inputs, targets, None, answers, {}, num_new=len(targets))

    assert der.loss(step()) == {}
    kept = [column.clone() for column in der.memory.columns]
    assert [tuple(column.shape) for column in kept] == [(12, 3, 4), (12, 3, 2), (12, 3, 2)]
    with torch.no_grad():
        for parameter in outlook.model.parameters():
            parameter.mul_(1.5)
    now, draw = outlook.model(kept[0])[0], torch.Generator()
    draw.set_state(der._draw.get_state())
    terms = der.loss(step())
    for name, strength, column in (("der_logits", 0.7, 2), ("der_labels", 0.4, 1)):
        rows = torch.randint(12, (12,), generator=draw)
        away = (now[rows] - kept[column][rows]).square().mean()
        torch.testing.assert_close(terms[name], strength * away)


def test_memories_of_any_numbers_are_asked_for(outlook: Outlook) -> None:
    inputs, _ = outlook.experience.train.tensors
    targets = torch.full((12, 3, 2), float(IGNORE))
    loss = loss_of(outlook, inputs, targets, torch.Generator)
    assert loss is not None
    torch.testing.assert_close(loss, (outlook.model(inputs)[0] - targets).square().mean())
