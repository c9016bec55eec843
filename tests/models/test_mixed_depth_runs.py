"""Experts that do nothing, and gated ones, through the command line: trained, grown, stopped, resumed."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from cl_moe.tracking import figures

WORDS = ["stream=text_domains", "stream.train_bytes=400", "stream.test_bytes=200", "stream.context=16"]
WORDS += ["stream.tune_on_first=2", "trainer.batch_size=8", "trainer.epochs=1", "tracking=none"]
WORDS += ["model.width=8", "model.num_heads=2", "model.num_blocks=2", "model.ffn_hidden=8"]
WORDS += ["layer=moe", "layer.num_experts=4", "layer.hidden=8"]
GROWN = ["growth=every_experience", "growth.num_experts=3", "growth.init=copy", "freeze=past_experts"]


@pytest.fixture(autouse=True)
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "write_figures", lambda record, folder: [])


@pytest.mark.slow
@pytest.mark.parametrize(
    "depth", [(), pytest.param(("model.depth=.5",), marks=pytest.mark.slow)], ids=["everywhere", "at depth"]
)
def test_integrated_mode_trains_grows_and_goes_on_to_the_same_bits(
    command: Callable, tmp_path: Path, depth: tuple[str, ...]
):
    noops = ["layer.num_noops=2", "layer.glu=true", "layer.activation=silu", "router.scores.bias_rate=1e-3"]
    done = command(*WORDS, *GROWN, *noops, *depth, "output_dir=out")
    assert done.status == 0, done.text
    table = pq.read_table(tmp_path / "out/expert_load.parquet")
    sizes = json.loads(table.schema.metadata[b"num_experts"])
    assert [set(point.values()) for point in sizes[1:]] == [{4 + 2}, {4 + 2 + 3}], "no-ops are counted"
    chosen = {row["expert"] for row in table.to_pylist() if row["count"]}
    assert {4, 5} & chosen or depth, "and chosen; a young predictor lets none through"
    matrix = (tmp_path / "out/accuracy_matrix.csv").read_bytes()
    assert len(list(csv.reader(matrix.decode().splitlines()))) == 4
    shutil.move(tmp_path / "out", tmp_path / "first")
    shutil.copytree(tmp_path / "first", tmp_path / "out")
    for last in (tmp_path / "out/checkpoints").glob("boundary_002-*"):
        shutil.rmtree(last) if last.is_dir() else last.unlink()
    done = command("resume=out")
    assert done.status == 0, done.text
    assert "resumed after experience 1 of 2" in done.text
    assert (tmp_path / "out/accuracy_matrix.csv").read_bytes() == matrix


@pytest.mark.slow
def test_an_upcycled_gated_family_goes_on_from_its_layers(command: Callable, tmp_path: Path):
    pytest.importorskip("transformers", reason="the extra `transformers` is not installed")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    words = [word for word in WORDS if not word.startswith("model.")]
    words += ["model=hugging_face", "model.model_type=llama", "model.upcycle=true"]
    words += [f"model.config.{key}={value}" for key, value in sizes.items()]
    gated = ["layer.glu=true", "layer.activation=silu", "layer.bias=false"]
    done = command(*words, *gated, "output_dir=out")
    assert done.status == 0, done.text
    refused = command(*words, "output_dir=other")
    assert refused.status == 2
    assert "layer.glu" in refused.text


def test_a_dense_gate_without_a_hidden_width_is_refused(command: Callable):
    done = command("layer=dense", "layer.glu=true", "tracking=none", "output_dir=out")
    assert done.status == 2
    assert "layer.glu" in done.text
    assert torch.get_num_threads() == 1
