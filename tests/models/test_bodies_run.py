"""Every body trains with every layer there is, through the command line; pairs that cannot be are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig

import conf
from cl_moe import launch
from cl_moe.errors import InputError
from cl_moe.experiment import run_experiment
from cl_moe.tracking import figures

Train = Callable[[str, str, str], None]

ROOT = Path(conf.__path__[0])
TEXT = ["stream.context=16", "trainer.batch_size=8", "trainer.epochs=1"]
BODIES = {
    "decoder": ["stream=text_domains", "stream.train_bytes=300", "stream.test_bytes=100", *TEXT],
    "encoder": ["stream=text_domains", "stream.train_bytes=300", "stream.test_bytes=100", *TEXT],
    "encoder_classifier": ["stream=split_texts", "stream.train_windows=8", "stream.test_windows=4", *TEXT],
    "decoder_classifier": ["stream=split_texts", "stream.train_windows=8", "stream.test_windows=4", *TEXT],
    "patch_transformer": ["stream=split_digits", "trainer.epochs=1", "trainer.batch_size=256"],
    "mlp": ["stream=split_digits", "trainer.epochs=1", "trainer.batch_size=256"],
}
MLP = ["model.width=8", "model.num_blocks=2", "model.ffn_hidden=8", "tracking=none"]
SMALL = [*MLP, "model.num_heads=2"]
FEW = {"moe": ["layer.num_experts=4", "layer.hidden=8"], "dense": []}
GRID = ["layer.num_experts=16", "layer.k=4"]
ROUTERS = sorted(path.stem for path in (ROOT / "router").glob("*.yaml"))
LAYERS = [("moe", router) for router in ROUTERS] + [
    (path.stem, "") for path in sorted((ROOT / "layer").glob("*.yaml")) if path.stem != "moe"
]
LOOK_AHEAD = {"gshard", "expert_choice"}
WAYS = [("fresh", "past_experts"), ("copy", "all_past"), ("zero_output", "past_experts_and_router")]


PAIRS = [(body, *layer) for body in BODIES for layer in LAYERS]
SOME = [(list(BODIES)[at % len(BODIES)], *layer) for at, layer in enumerate(LAYERS)]  # each body, each layer


@pytest.fixture
def train(composed: Callable[..., DictConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """Two experiences of a body with a layer; a pair that cannot be is seen to be refused."""
    monkeypatch.setattr(figures, "write_figures", lambda record, folder: [])

    def run_pair(body: str, layer: str, router: str) -> None:
        small = MLP if body == "mlp" else SMALL
        words = [*BODIES[body], f"model={body}", f"layer={layer}", *small, *FEW.get(layer, GRID)]
        words += [f"router={router}"] if router else []
        if layer != "dense":
            words += ["growth=every_experience", f"growth.num_experts={4 if layer == 'moe' else 16}"]
            init, freeze = WAYS[(list(BODIES).index(body) + LAYERS.index((layer, router))) % len(WAYS)]
            words += [f"freeze={freeze}", f"growth.init={init}"]
        config = composed(*words, "stream.tune_on_first=2", f"output_dir={tmp_path}")
        if router in LOOK_AHEAD and body.startswith("decoder"):
            with pytest.raises(InputError, match="looks ahead"):
                launch.build(config)
            return
        run = launch.build(config)
        run_experiment(run)
        assert run.measured.matrix.shape == (3, 2)
        assert run.measured.matrix.isfinite().all()
        assert (len(run.measured.loads[-1]) > 0) == (layer != "dense")
        assert any(event["act"] == "grow" for event in run.learner.ledger) == (layer != "dense")

    return run_pair


@pytest.mark.parametrize("pair", SOME, ids="-".join)
def test_each_body_and_each_layer_trains(pair: tuple[str, str, str], train: Train) -> None:
    train(*pair)


@pytest.mark.slow
@pytest.mark.parametrize("pair", [pair for pair in PAIRS if pair not in SOME], ids="-".join)
def test_every_body_trains_with_every_layer(pair: tuple[str, str, str], train: Train) -> None:
    train(*pair)


@pytest.mark.parametrize(
    "body", ["decoder", *(pytest.param(b, marks=pytest.mark.slow) for b in ("encoder", "patch_transformer"))]
)
def test_depth_and_projections_through_the_command_line(body: str, command) -> None:
    done = command(
        *BODIES[body],
        *SMALL,
        *FEW["moe"],
        f"model={body}",
        "layer=moe",
        "model.depth={capacity:0.5,every:1}",
        "model.attention_slots=[query,value]",
        "model.slots=middle",
        "growth=every_experience",
        "growth.num_experts=2",
        "growth.init=fresh",
        "stream.tune_on_first=2",
    )
    assert done.status == 0, done.text
    for layer in (1, 3, 7):  # the block, its query, its value
        assert f"layer_{layer:02d}: 6 experts" in done.text


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["model=encoder"], "model (or stream)"),
        (["model=encoder_classifier"], "model (or stream)"),
        (["model=patch_transformer", "model.depth={share:0.5}"], "model.depth.share"),
        (["model=patch_transformer", "model.depth=deep"], "model.depth"),
        (["model=patch_transformer", "model.attention_slots=[q]"], "model.attention_slots"),
        (["model=patch_transformer", "stream=text_domains"], "model (or stream)"),
        (["model=decoder", "stream=text_domains", "layer=moe", "router=expert_choice"], "router (or model)"),
        (
            ["layer=moe", "router=expert_choice", "router.rounding=floor"],
            "router.rounding (or router.capacity_factor, model)",
        ),
        (
            ["layer=peer", *GRID, "layer.retrieval.grow_by=shell", "growth=at", "growth.events={1:65}"],
            "growth.num_experts",
        ),
    ],
)
def test_a_pair_that_cannot_be_is_one_message(words: list[str], key: str, command) -> None:
    done = command(*words, "tracking=none")
    assert done.status == 2, done.text
    assert f"change: {key}" in done.text
    assert "Traceback" not in done.text
