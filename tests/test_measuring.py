"""Why it forgot: the options, planted cases, and what is frozen."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig

from cl_moe import checkpoint, experiment, launch
from cl_moe.errors import InputError
from cl_moe.layers import router_names
from cl_moe.measuring import Measuring
from cl_moe.run import Run
from cl_moe.stream import Experience
from cl_moe.tracking import artifacts

DIGITS = (
    *("tracking=none", "trainer.epochs=1", "stream.tune_on_first=3", "model.width=16"),
    "eval.decomposition=always",
)
MOE = ("layer=moe", "layer.hidden=8", "layer.num_experts=4")
GROW = ("growth=every_experience", "growth.num_experts=4")
PEER = ("layer=peer", "layer.num_experts=16", "layer.k=2", "layer.heads=2")
TEXT = (
    *("stream=text_domains", "stream.train_bytes=6000", "stream.test_bytes=2000", "stream.context=32"),
    "trainer.batch_size=32",
)
Go = Callable[[Sequence[str]], Run]


pytestmark = pytest.mark.usefixtures("no_drawing")


@pytest.fixture
def go(composed: Callable[..., DictConfig], tmp_path_factory: pytest.TempPathFactory) -> Go:
    def through(words: Sequence[str]) -> Run:
        run = launch.build(composed(*DIGITS, *words, f"output_dir={tmp_path_factory.mktemp('run')}"))
        experiment.run_experiment(run)
        return run

    return through


def test_the_yaml_says_what_the_constructor_does(composed: Callable[..., DictConfig]):
    defaults = {name: p.default for name, p in inspect.signature(Measuring).parameters.items()}
    node = composed().eval
    assert {key: value for key, value in node.items() if key != "_target_"} == defaults


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"decomposition": "sometimes"}, "eval.decomposition"),
        ({"samples": -1}, "eval.samples"),
        ({"samples": 1.5}, "eval.samples"),
        ({"cumulative": " "}, "eval.cumulative"),
    ],
)
def test_bad_options_name_their_key(options: dict[str, Any], key: str):
    with pytest.raises(InputError) as caught:
        Measuring(**options)
    assert caught.value.key == key


@pytest.mark.parametrize(
    ("word", "due"), [("end", [4]), ("always", [2, 3, 4]), ("never", [])], ids=lambda value: str(value)
)
def test_when_forgetting_is_decomposed(word: Any, due: list[int]):
    assert [i for i in range(5) if Measuring(word).decomposes(i, 4)] == due
    assert not Measuring(word).decomposes(1, 1), "nothing is old after one experience"


def test_weights_that_are_frozen_forgot_nothing_through_the_command_line(command: Callable, tmp_path: Path):
    words = (*DIGITS, *MOE, *GROW, "freeze=all_past", "hydra.run.dir=out")
    done = command(*words, "objective=stream/forgetting_weights")
    assert done.status == 0, done.text
    assert done.objectives == [0.0]
    state = checkpoint.newest(tmp_path / "out" / "checkpoints")
    assert state is not None
    R = artifacts.read_matrix(tmp_path / "out" / artifacts.MATRIX).scores
    _nothing_but_routing(R, state["record"]["rewound"])


FROZEN = {
    "peer": (*PEER, *GROW[:1], "growth.num_experts=16", "growth.init=fresh"),
    "task": (*MOE, *GROW, "stream.scenario=task"),
    "text": (*TEXT, *MOE, *GROW),
    "text in depth": (*TEXT, *MOE, *GROW, "model.slots=all", "model.depth=0.5"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=pytest.mark.slow) if x == "text in depth" else x for x in FROZEN]
)
def test_weights_that_are_frozen_forgot_nothing(name: str, go: Go):
    run = go((*FROZEN[name], "freeze=all_past"))
    _nothing_but_routing(run.measured.matrix, run.measured.rewound)


def _nothing_but_routing(R: torch.Tensor, found: dict[int, torch.Tensor]) -> None:
    """Trunk, router, experts and head were frozen: F_w = 0 exactly, whatever newborns took."""
    assert list(found) == [2, 3]
    for i, rewound in found.items():
        assert torch.equal(rewound, R.diagonal(offset=-1)[: i - 1])
    assert not torch.equal(found[3], R[3, :2]), "newborns took tokens, or new classes answers"


@pytest.mark.parametrize("layer", [MOE, PEER, ("layer=pkm", *PEER[1:])], ids=["moe", "peer", "pkm"])
@pytest.mark.parametrize("moved", ["router", "weights"])
def test_a_planted_cause_is_found(moved: str, layer: Sequence[str], go: Go, monkeypatch: pytest.MonkeyPatch):
    """After the first experience nothing is trained: either the router is moved by hand, or all the rest."""
    trained = experiment.fit

    def planted(run: Run, at: Experience) -> None:
        if at.index == 0:
            return trained(run, at)
        run.trained, run.learner.experience, model = True, at, run.learner.model
        chosen, draw = set(router_names(model)), torch.Generator().manual_seed(at.index)
        with torch.no_grad():
            for name, value in model.state_dict().items():
                if (name in chosen) == (moved == "router"):
                    value.add_(torch.rand(value.shape, generator=draw))

    monkeypatch.setattr(experiment, "fit", planted)
    run = go((*layer, "stream=permuted_digits", "stream.num_experiences=3", "stream.tune_on_first=null"))
    R, rewound = run.measured.matrix, run.measured.rewound[3]
    learnt = R.diagonal(offset=-1)[:2]
    assert not torch.equal(learnt, R[3, :2]), "something was forgotten"
    assert torch.equal(rewound, learnt if moved == "router" else R[3, :2])


def test_a_dense_language_model_forgets_by_its_weights(go: Go, monkeypatch: pytest.MonkeyPatch):
    """No newborns, no new classes, no router: nothing has to be run to know that."""
    monkeypatch.setattr("cl_moe.models.rewind.RouterState.logits", None)
    record = go((*TEXT, "layer=dense")).measured
    for i, rewound in record.rewound.items():
        assert torch.equal(rewound, record.matrix[i, : i - 1])


def test_what_is_switched_off_changes_no_score_and_is_not_kept(go: Go):
    words = (*MOE, *GROW, "freeze=past_experts")
    on = go(words)
    off = go((*words, "eval.decomposition=never", "eval.samples=0"))
    assert torch.equal(on.measured.matrix, off.measured.matrix)
    assert off.past.num_bytes == 0
    assert off.measured.rewound == {}
    assert not [key for key in off.measured.points[-1] if "drift" in key]
    assert [key for key in on.measured.points[-1] if "drift" in key]
