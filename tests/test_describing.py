"""``describe=true``: what a stream holds, told and written without training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from cl_moe import launch
from cl_moe.stream import Experience, Stream
from cl_moe.tracking import overview

TEXT = ("stream=text_domains", "stream.train_bytes=3000", "stream.test_bytes=1000", "stream.context=16")
Command = Callable[..., Any]


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a description built a run")

    monkeypatch.setattr(launch, "build", refuse)


def test_images_are_shown(command: Command, tmp_path: Path, untrained: None) -> None:
    done = command("describe=true", "stream.shape={imbalance:.5}", "output_dir=out")
    assert done.status == 0
    assert "5 experiences, classification, scenario class, 10 classes, inputs 64" in done.text
    told = json.loads((tmp_path / "out/stream.json").read_text())
    assert [entry["name"] for entry in told["experiences"]] == [
        f"digits {i}-{i + 1}" for i in range(0, 10, 2)
    ]
    for entry in told["experiences"]:
        assert f"train {entry['train']:>7}  test {entry['test']:>6}" in done.text
        few, many = sorted(entry["train_classes"].values())
        assert (f", {few} examples each" if few == many else f", {few} .. {many} examples each") in done.text
        assert sum(entry["train_classes"].values()) == entry["train"]
        assert set(entry["test_classes"]) == set(map(str, entry["classes"]))
    with Image.open(tmp_path / "out/samples.png") as sheet:
        assert min(sheet.size) > 300
    assert f"written to {tmp_path / 'out'}: stream.json, samples.png" in done.text
    assert not (tmp_path / "out/config.yaml").exists()


@pytest.mark.parametrize("tokenizer", ["null", "{kind:bpe,vocab_size:300}"])
def test_texts_are_shown(command: Command, tmp_path: Path, untrained: None, tokenizer: str) -> None:
    done = command("describe=true", *TEXT, f"stream.tokenizer={tokenizer}", "output_dir=out")
    assert done.status == 0
    shown = (tmp_path / "out/samples.txt").read_text()
    assert [line for line in shown.splitlines() if line.startswith("==")] == [
        "== 1: novels_en", "== 2: bible_en", "== 3: python_code",
    ]  # fmt: skip
    told = json.loads((tmp_path / "out/stream.json").read_text())
    assert all(entry["train_tokens"] <= 2999 for entry in told["experiences"])
    if tokenizer == "null":
        assert [entry["train_tokens"] for entry in told["experiences"]] == [2999] * 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("stream.scenario=none",), "change: stream.scenario"),
        (("stream.shape={blurr:.1}",), "change: stream.shape.blurr"),
        (("stream=hf", "stream.source.path=absent.csv"), "change: stream.source.path"),
        (("stream=hf", "stream.columns.input=body"), "change: stream.columns.input"),
        (("describe=maybe",), "change: describe"),
    ],
)
def test_a_bad_stream_is_told_in_one_message(
    command: Command, arguments: tuple[str, ...], words: str
) -> None:
    done = command("describe=true", *arguments)
    assert done.status == 2
    assert words in done.text
    assert "Traceback" not in done.text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("stream.shape={online:true}", "trainer.epochs=2"), "trainer.epochs (or stream.shape.online)"),
        (
            ("stream=hf", "model=encoder_classifier", "stream.source.path=a.csv", "stream.columns.label=kind",
             "stream.source.test_share=.5", "stream.classes_per_experience=1", "stream.scenario=class",
             "stream.tokenizer={kind:bpe,vocab_size:258}"),
            "model.vocabulary=258",
        ),
        (
            ("stream=hf", "model=mlp", "stream.source.path=a.csv", "stream.columns.label=kind",
             "stream.source.test_share=.5", "stream.classes_per_experience=1", "stream.scenario=class"),
            "model=encoder_classifier or model=decoder_classifier",
        ),
        (("model=encoder_classifier",), "model=mlp or model=patch_transformer"),
        (
            ("stream=permuted_mnist", "stream.num_experiences=1", "model=decoder_classifier"),
            "inputs of shape (28, 28)",
        ),
    ],
)  # fmt: skip
def test_what_a_run_would_fail_by_is_refused(
    command: Command, tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    (tmp_path / "a.csv").write_text("text,kind\n" + "hello there hello,ant\nhello again there,bee\n" * 4)
    done = command(*arguments)
    assert (done.status, words in done.text) == (2, True), done.text


@pytest.mark.parametrize("shape", [(2,), (2, 5, 5), (25,)])
def test_what_is_no_image_is_shown_as_numbers(tmp_path: Path, shape: tuple[int, ...]) -> None:
    data = TensorDataset(torch.rand(3, *shape), torch.tensor([0, 1, 0]))
    made = Stream("m", "classification", "class", (Experience(0, "only", data, data, (0, 1)),), 2, shape)
    names = [path.name for path in overview.write_overview(made, tmp_path)]
    assert names == ["stream.json", "samples.png" if shape == (25,) else "samples.txt"]
    assert (tmp_path / names[1]).stat().st_size > 0


@pytest.mark.slow
def test_a_long_stream_has_a_sheet_of_bounded_height(tmp_path: Path) -> None:
    data = TensorDataset(torch.rand(3, 4, 4), torch.tensor([0, 1, 0]))
    many = tuple(Experience(index, f"e{index}", data, data, (0, 1)) for index in range(100))
    overview.write_overview(Stream("m", "classification", "domain", many, 2, (4, 4)), tmp_path)
    with Image.open(tmp_path / "samples.png") as sheet:
        assert sheet.height < 20_000
