"""Text streams under every layer and the strategies made for them: it runs, or is refused by a message."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import conf

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_drawing")]
SMALL = ("model.width=16", "model.num_blocks=1", "model.num_heads=2", "tracking=none", "hydra.run.dir=run")
LINES = ("stream.train_bytes=3000", "stream.test_bytes=700", "stream.context=32", "trainer.batch_size=16")
STREAMS: dict[str, tuple[str, ...]] = {
    "text_domains": (*LINES, "stream.domains=[novels_en,python_code]", "model.slots=all"),
    "text_languages": (*LINES, "model.slots=all"),
    "intents": ("stream.context=24", "stream.tune_on_first=2", "trainer.epochs=1", "model.slots=all"),
}
MOE = (
    "layer=moe",
    "layer.num_experts=4",
    "layer.hidden=8",
    "growth=every_experience",
    "growth.num_experts=4",
)
KEYS = (
    "layer.num_experts=16",
    "layer.k=2",
    "layer.heads=2",
    "growth=every_experience",
    "growth.num_experts=16",
)
LAYERS: dict[str, tuple[str, ...]] = {
    "dense": ("layer=dense",),
    **{
        f"moe {router}": (*MOE, f"router={router}")
        for router in ("top_k", "switch", "gshard", "expert_choice")
    },
    "peer": ("layer=peer", *KEYS, "growth.init=fresh"),
    "pkm": ("layer=pkm", *KEYS, "growth.init=fresh"),
}
AHEAD = ("moe expert_choice", "moe gshard")
"""Routers that look at later tokens, which a causal model refuses and a classifier of texts takes."""
REFUSED = {"bic", "gdumb", "icarl", "l2p", "latent_replay", "weight_aligning", "distill_from"}
"""Need classes, patches, a cut, or a run to learn from."""
WORDS: dict[str, tuple[str, ...]] = {
    "demix": (*MOE[:1], "layer.num_experts=1", "router.k=1", *MOE[2:4], "growth.num_experts=1"),
    "continual_backprop": ("layer.hidden=8", "strategy.continual_backprop.rate=0.1"),
    "joint": MOE[:3],
    **{f"sparse_memory {score}": LAYERS["peer"] for score in ("tf_idf", "tf", "all")},
}
EVERY = [path.stem for path in sorted(Path(conf.__path__[0], "strategy").glob("*.yaml"))]
STRATEGIES = ("naive", "replay", "lwf", "lifelong_moe", "sparse_memory")


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("stream", STREAMS)
def test_it_runs(stream: str, layer: str, strategy: str, command: Callable[..., Any], tmp_path: Path) -> None:
    if stream == "intents" and not os.environ.get("CL_MOE_DATA"):
        pytest.skip("clinc150.parquet is looked for in CL_MOE_DATA, which is not set")
    words = (f"stream={stream}", *STREAMS[stream], *LAYERS[layer], f"strategy={strategy}", *SMALL)
    done = command(*words)
    sees_the_future = layer in AHEAD and stream != "intents"
    no_rows = strategy == "sparse_memory" and layer not in ("peer", "pkm")
    if sees_the_future or no_rows:
        assert (done.status, "change: " in done.text) == (2, True), done.text
        return
    assert done.status == 0, done.text
    with (tmp_path / "run/accuracy_matrix.csv").open() as file:
        scores = [float(cell) for row in list(csv.reader(file))[1:] for cell in row[1:]]
    assert len(scores) == 6
    assert all(math.isfinite(score) for score in scores)
    if stream != "intents":
        assert scores[2] > scores[0], "an epoch teaches something of the first text"


@pytest.mark.parametrize("words", [name for name in EVERY if name != "sparse_memory"] + list(WORDS)[-3:])
def test_every_strategy_learns_texts_or_says_why_not(
    words: str, command: Callable[..., Any], tmp_path: Path
) -> None:
    name, _, score = words.partition(" ")
    more = (
        (f"strategy.sparse_memory.score={score}", "strategy.sparse_memory.num_background=4") if score else ()
    )
    layer = WORDS.get(words, MOE)
    done = command("stream=text_domains", *STREAMS["text_domains"], *layer, f"strategy={name}", *more, *SMALL)
    if name in REFUSED:
        assert (done.status, "change: " in done.text) == (2, True), done.text
        return
    assert done.status == 0, done.text
    with (tmp_path / "run/accuracy_matrix.csv").open() as file:
        scores = [float(cell) for row in list(csv.reader(file))[1:] for cell in row[1:]]
    assert all(math.isfinite(score) for score in scores)
    assert scores[2] > scores[0], "an epoch teaches something of the first text"
