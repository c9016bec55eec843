"""Runs on data that are streamed: the next sample after an end in the middle, and bounded memory."""

from __future__ import annotations

import runpy
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from PIL import Image

from cl_moe import checkpoint, learner
from tasks.hf import hf

Command = Callable[..., Any]
differences = runpy.run_path(str(Path(__file__).with_name("chaos.py")))["differences"]
pytestmark = pytest.mark.usefixtures("no_drawing")
WORDS = (
    *("stream=hf", "stream.source.path=a.parquet", "stream.columns.domain=place"),
    *("stream.block=16", "stream.shape={online:true}", "stream.context=16", "model.width=8"),
    *("model.num_blocks=1", "trainer.batch_size=6", "tracking=none", "checkpoint.every_steps=1"),
)


def table(rows: int) -> None:
    places = ["here", "there"] * (rows // 2)
    splits = ["test" if number % 9 == 0 else "train" for number in range(rows)]
    texts = [f"row {number} of a text\n" for number in range(rows)]
    pd.DataFrame({"text": texts, "place": places, "split": splits}).to_parquet("a.parquet")


@pytest.mark.parametrize("streaming", ["true", pytest.param("false", marks=pytest.mark.slow)])
def test_an_interrupted_online_stream_goes_on_with_the_next_sample(
    streaming: str, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table(120)
    words = (*WORDS, f"stream.streaming={streaming}", "strategy=replay")
    seen: list[bytes] = []
    step = learner.Learner.training_step

    def noting(self: Any, batch: Any, batch_idx: int) -> Any:
        if len(seen) == stop_at:
            raise KeyboardInterrupt
        seen.append(batch[0].numpy().tobytes())
        return step(self, batch, batch_idx)

    monkeypatch.setattr(learner.Learner, "training_step", noting)
    stop_at = -1
    assert command(*words, "hydra.run.dir=whole").status == 0
    whole, stop_at = list(seen), 5
    seen.clear()
    assert len(whole) == len(set(whole)), "no sample comes twice"
    stopped = command(*words, "hydra.run.dir=cut")
    assert stopped.status != 0
    stop_at = -1
    assert command("resume=cut").status == 0
    assert seen == whole, "not one is lost, doubled, or out of its place"
    states = [checkpoint.newest(tmp_path / name / "checkpoints") for name in ("whole", "cut")]
    kept = [{part: state[part] for part in ("learner", "record", "past")} for state in states if state]
    assert list(differences(*kept)) == []


@pytest.mark.parametrize("strategy", ["ewc", "joint", "gem"])
def test_a_strategy_that_wants_everything_is_refused(command: Command, strategy: str) -> None:
    table(40)
    done = command(*WORDS, "stream.streaming=true", f"strategy={strategy}")
    assert (done.status, "streamed" in done.text) == (2, True), done.text


def test_a_description_reads_it_too(command: Command, tmp_path: Path) -> None:
    table(40)
    done = command(*WORDS, "stream.streaming=true", "describe=true", "output_dir=out")
    assert done.status == 0, done.text
    assert "row 2 of a text" in (tmp_path / "out/samples.txt").read_text()


@pytest.mark.parametrize("model", ["mlp", pytest.param("patch_transformer", marks=pytest.mark.slow)])
def test_colour_images_are_learnt_streamed_and_changed(model: str, command: Command, tmp_path: Path) -> None:
    for side in ("learn", "see"):
        for kind, colour in (("ant", (200, 40, 40)), ("bee", (40, 40, 200))):
            (tmp_path / side / kind).mkdir(parents=True)
            for number in range(6):
                Image.new("RGB", (4, 4), tuple(part + number for part in colour)).save(
                    tmp_path / side / kind / f"{number}.png"
                )
    images = ("stream=hf", "stream.source.path=learn", "stream.source.test=see", "stream.columns.input=image")
    words = (*images, "stream.columns.label=label", f"model={model}", "model.width=16", "tracking=none")
    streamed = ("stream.scenario=class", "stream.classes_per_experience=1", "stream.streaming=true")
    done = command(*words, *streamed, "stream.block=4", "strategy=replay", "hydra.run.dir=one")
    assert done.status == 0, done.text
    change = "stream.transform={kind:coloured,hues:[0,120,240]}"
    many = ("trainer.epochs=20", "trainer.batch_size=4", "optimizer.lr=.01", "optimizer=adamw")
    done = command(*words, change, *many, "hydra.run.dir=two")
    assert done.status == 0, done.text
    scores = (tmp_path / "two/accuracy_matrix.csv").read_text().splitlines()
    assert scores[1 + 1].split(",")[1] == "1.0", "red and blue are told apart"
    assert len(scores) == 1 + 1 + 3


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    peaks = []
    for rows in (1_500, 12_000):
        table(rows)
        tracemalloc.start()
        data = hf({"path": "a.parquet"}, {}, streaming=True, block=256, context=64)[0].train
        for first in range(0, len(data), 256):
            data.read(first // 256)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 3 * peaks[0] + 500_000, peaks
