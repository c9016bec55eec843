"""Runs on data that are streamed: the next sample after an end in the middle, and bounded memory."""

from __future__ import annotations

import runpy
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from cl_moe import checkpoint, learner
from tasks.hf import hf

Command = Callable[..., Any]
differences = runpy.run_path(str(Path(__file__).with_name("chaos.py")))["differences"]
pytestmark = pytest.mark.usefixtures("no_drawing")
WORDS = (
    *("stream=hf", "stream.source.path=a.parquet", "stream.columns.domain=place", "stream.streaming=true"),
    *("stream.block=16", "stream.shape={online:true}", "stream.context=16", "model.width=8"),
    *("model.num_blocks=1", "trainer.batch_size=6", "tracking=none", "checkpoint.every_steps=1"),
)


def table(rows: int) -> None:
    places = ["here", "there"] * (rows // 2)
    splits = ["test" if number % 9 == 0 else "train" for number in range(rows)]
    texts = [f"row {number} of a text\n" for number in range(rows)]
    pd.DataFrame({"text": texts, "place": places, "split": splits}).to_parquet("a.parquet")


def test_an_interrupted_online_stream_goes_on_with_the_next_sample(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table(120)
    seen: list[bytes] = []
    step = learner.Learner.training_step

    def noting(self: Any, batch: Any, batch_idx: int) -> Any:
        if len(seen) == stop_at:
            raise KeyboardInterrupt
        seen.append(batch[0].numpy().tobytes())
        return step(self, batch, batch_idx)

    monkeypatch.setattr(learner.Learner, "training_step", noting)
    stop_at = -1
    assert command(*WORDS, "strategy=replay", "hydra.run.dir=whole").status == 0
    whole, stop_at = list(seen), 5
    seen.clear()
    assert len(whole) == len(set(whole)), "no sample comes twice"
    stopped = command(*WORDS, "strategy=replay", "hydra.run.dir=cut")
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
    done = command(*WORDS, f"strategy={strategy}")
    assert (done.status, "streamed" in done.text) == (2, True), done.text


def test_a_description_reads_it_too(command: Command, tmp_path: Path) -> None:
    table(40)
    done = command(*WORDS, "describe=true", "output_dir=out")
    assert done.status == 0, done.text
    assert "row 2 of a text" in (tmp_path / "out/samples.txt").read_text()


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
