"""Texts that are streamed: the same rows as held in memory, in any blocks, from any place on."""

from __future__ import annotations

import gc
import json
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from cl_moe.batches import training_loader
from cl_moe.errors import InputError
from cl_moe.stream import Stream, Streamed, chunks
from tasks import hub
from tasks.hf import hf

pytestmark = pytest.mark.filterwarnings(
    "ignore:unclosed file:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
KINDS = ["ant", "bee", "cow", "dog"]


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """The library closes a file that was not read to its end when its iterator is forgotten, and warns."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture
def frame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pd.DataFrame:
    monkeypatch.chdir(tmp_path)
    count = 90
    return pd.DataFrame(
        {
            "text": [f"text {number} " * (number % 5 + 1) for number in range(count)],
            "kind": [KINDS[number % 4] for number in range(count)],
            "place": [("here", "there", "elsewhere")[number % 3] for number in range(count)],
            "split": ["test" if number % 7 == 0 else "train" for number in range(count)],
        }
    )


def write(frame: pd.DataFrame, name: str) -> str:
    suffix = Path(name).suffix
    if suffix == ".parquet":
        frame.to_parquet(name, row_group_size=11)
    elif suffix == ".jsonl":
        frame.to_json(name, orient="records", lines=True)
    else:
        frame.to_csv(name, index=False)
    return name


def joined(data: Any) -> list[torch.Tensor]:
    return [torch.cat(column) for column in zip(*chunks(data), strict=True)]


@pytest.mark.parametrize("name", ["a.parquet", "a.csv", "a.jsonl"])
@pytest.mark.parametrize("block", [4, 1000])
@pytest.mark.parametrize(
    "words",
    [
        {"columns": {"domain": "place"}, "context": 16},
        {"columns": {}, "context": 7, "tokenizer": {"kind": "bpe", "vocab_size": 262}},
        {"columns": {"label": "kind"}, "scenario": "class", "classes_per_experience": 2, "context": 48},
        {"columns": {"label": "kind"}, "scenario": "domain", "classes_per_experience": 2, "context": 48},
        {"columns": {"label": "kind", "domain": "place"}, "scenario": "class", "context": 48, "seed": 3},
    ],
)  # fmt: skip
def test_it_holds_what_it_would_hold_in_memory(
    frame: pd.DataFrame, name: str, block: int, words: dict[str, Any], no_network: None
) -> None:
    path = write(frame, name)
    read = hf({"path": path}, **words)
    streamed = hf({"path": path}, **words, streaming=True, block=block)
    assert (len(read), read.num_classes, read.scenario) == (
        len(streamed), streamed.num_classes, streamed.scenario,
    )  # fmt: skip
    for one, two in zip(read, streamed, strict=True):
        assert isinstance(two.train, Streamed)
        assert (one.name, one.classes, one.task_label) == (two.name, two.classes, two.task_label)
        assert len(one.train) == len(two.train)
        for held, found in zip(one.train.tensors, joined(two.train), strict=True):
            assert torch.equal(held, found)
        for held, found in zip(one.test.tensors, two.test.tensors, strict=True):
            assert torch.equal(held, found)
        picked = torch.randperm(len(two.train))[:5]
        assert all(map(torch.equal, one.train[picked], two.train[picked])), "from any place on"


def test_every_row_comes_once_within_its_block_and_again_from_any_batch(frame: pd.DataFrame) -> None:
    words = {"columns": {"domain": "place"}, "context": 4, "streaming": True, "block": 10}
    data = hf({"path": write(frame, "a.parquet")}, **words)[0].train
    whole, reads = joined(data), []
    read = data.read
    data.read = lambda block: (reads.append(block), read(block))[1]  # type: ignore[method-assign]

    def epoch(number: int, skip: int = 0) -> list[torch.Tensor]:
        loader = training_loader(data, 4, 3, 0)
        loader.sampler.begin_at(number, skip)  # type: ignore[attr-defined]
        return [torch.cat(batch, dim=1) for batch in loader]

    batches = epoch(0)
    assert sorted(reads) == list(range(-(-len(data) // 10))), "each block is read once"
    assert [len(batch) for batch in batches[:-1]] == [4] * (len(batches) - 1)
    rows = torch.cat(batches)
    natural = torch.cat(whole, dim=1)
    for first in range(0, len(data), 10):
        mine, theirs = (Counter(map(tuple, part[first : first + 10].tolist())) for part in (rows, natural))
        assert mine == theirs
    assert not torch.equal(rows, natural)
    assert not torch.equal(torch.cat(epoch(1)), rows)
    for skip in range(len(batches) + 1):
        assert all(map(torch.equal, epoch(0, skip), batches[skip:]))
        assert len(epoch(0, skip)) == len(batches) - skip


@pytest.mark.parametrize(
    ("change", "words", "key", "got"),
    [
        ({}, {"columns": {"input": "body"}}, "stream.columns.input", "a column 'body'"),
        (
            {},
            {"columns": {"input": ["x"], "label": "kind", "domain": "place"}},
            "stream.columns.input",
            "'x'",
        ),
        ({}, {"columns": {"input": ["text"], "domain": "place"}}, "stream.columns.label", "numbers"),
        ({}, {"source": {"test": "owner/name"}}, "stream.source.test", "owner/name"),
        ({}, {"source": {"path": "absent.jsonl"}}, "stream.source.path", "absent.jsonl"),
        ({}, {"transform": {"kind": "rotated"}}, "stream.transform", "streamed"),
        ({}, {"source": {"test_share": 0.2}}, "stream.source.test_share", "test_share"),
        ({}, {"cut": 2}, "stream.streaming", "all rows at once"),
        ({}, {"shape": {"blurry": 0.1}}, "stream.streaming", "all rows at once"),
        ({}, {"block": 0}, "stream.block", "0"),
        ({"text": 5}, {}, "stream.columns.input", "row 33"),
        ({"split": "neither"}, {}, "stream.source.test", ""),
    ],
)
def test_what_is_refused(
    frame: pd.DataFrame, change: dict[str, Any], words: dict[str, Any], key: str, got: str
) -> None:
    rows = frame.to_dict("records")
    if "split" in change:
        rows = [{name: value for name, value in row.items() if name != "split"} for row in rows]
    elif change:
        rows[33] |= {"text": None, "split": "train"}
    Path("a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"path": "a.jsonl", **words.pop("source", {})}
    with pytest.raises(InputError) as caught:
        hf(source, words.pop("columns", {"domain": "place"}), streaming=True, **words)
    assert caught.value.key.startswith(key)
    assert got in caught.value.got + caught.value.allowed


def alike(read: Stream, streamed: Stream) -> None:
    """Two streams hold the same, the one in memory, the other in blocks."""
    assert (len(read), read.num_classes, read.input_shape) == (
        len(streamed), streamed.num_classes, streamed.input_shape,
    )  # fmt: skip
    for one, two in zip(read, streamed, strict=True):
        assert isinstance(two.train, Streamed)
        assert (one.name, one.classes, one.task_label) == (two.name, two.classes, two.task_label)
        for side, found in ((one.train, joined(two.train)), (one.test, two.test.tensors)):
            for held, other in zip(side.tensors, found, strict=True):
                torch.testing.assert_close(held, other)


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("name", ["a.parquet", "a.csv", "a.jsonl"])
def test_numbers_and_categories_are_those_held_in_memory(
    frame: pd.DataFrame, name: str, standardize: bool
) -> None:
    frame["x"], frame["one"] = frame.index * 0.37 - 5, 3
    columns = {"input": ["x", "kind", "one"], "label": "place", "standardize": standardize}
    words = {"scenario": "class", "classes_per_experience": 1, "seed": 1}
    path = write(frame, name)
    read = hf({"path": path}, columns, **words)
    for block in (4, 1000):
        alike(read, hf({"path": path}, columns, **words, streaming=True, block=block))
    assert read.input_shape == (1 + len(KINDS) + 1,)


@pytest.mark.parametrize(
    ("column", "row", "value"), [("x", 31, "much"), ("x", 32, None), ("kind", 7, "elk"), ("kind", 30, 3)]
)
def test_a_value_of_another_kind_is_named_by_its_row(
    frame: pd.DataFrame, column: str, row: int, value: Any
) -> None:
    rows = frame.assign(x=1.5).to_dict("records")
    rows[row][column] = value
    Path("a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"input": ["x", "kind"], "label": "place"}
    with pytest.raises(InputError, match=rf"a\.jsonl.* {row}\b"):
        hf({"path": "a.jsonl"}, columns, "class", 1, streaming=True)


def drawn(folder: Path, count: int = 7, damaged: bool = False) -> dict[str, str]:
    """Colour images of two kinds in folders to learn from and to test on."""
    draw = np.random.default_rng(0)
    for side, number in (("learn", count), ("see", 3)):
        for kind in ("cat", "owl"):
            (folder / side / kind).mkdir(parents=True)
            for place in range(number):
                pixels = draw.integers(0, 256, (5, 4, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / side / kind / f"{place}.png")
    if damaged:
        (folder / "learn/owl/2.png").write_bytes(b"not an image")
    return {"path": str(folder / "learn"), "test": str(folder / "see")}


@pytest.mark.parametrize("form", ["folder", "parquet"])
def test_images_are_those_held_in_memory(tmp_path: Path, form: str) -> None:
    source, words = drawn(tmp_path), {"scenario": "class", "classes_per_experience": 1}
    columns = {"input": "image", "label": "label"}
    if form == "parquet":
        for side, name in source.items():
            table = hub.from_files([Path(name)], "")
            source[side] = str(tmp_path / f"{side}.parquet")
            table.to_parquet(source[side])
    read = hf(source, columns, **words)
    assert read.input_shape == (3, 5, 4)
    for block in (3, 1000):
        alike(read, hf(source, columns, **words, streaming=True, block=block))


def test_a_damaged_image_is_named_before_training(tmp_path: Path) -> None:
    source = drawn(tmp_path, damaged=True)
    with pytest.raises(InputError, match=r"row 9 .*owl/2\.png.* cannot be decoded"):
        hf(source, {"input": "image", "label": "label"}, "class", 1, streaming=True)


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.csv", "text,split\ncaf\xe9,train\n".encode("latin-1")), ("a.parquet", b"PAR1 nothing PAR1")],
)
def test_a_damaged_file_is_named(frame: pd.DataFrame, name: str, content: bytes) -> None:
    Path(name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name}, which cannot be read"):
        hf({"path": name, "test": write(frame, f"b{Path(name).suffix}")}, {}, streaming=True)


def test_a_test_class_that_nobody_learns_is_refused(frame: pd.DataFrame) -> None:
    frame.loc[7, "kind"] = "elk"
    with pytest.raises(InputError, match="'elk' in row 7"):
        hf(
            {"path": write(frame, "a.csv")},
            {"label": "kind"},
            scenario="class",
            classes_per_experience=2,
            streaming=True,
        )


def test_a_test_domain_that_nobody_learns_is_refused(frame: pd.DataFrame) -> None:
    frame.loc[7, "place"] = "nowhere"
    with pytest.raises(InputError, match="'nowhere' in row 7"):
        hf({"path": write(frame, "a.csv")}, {"label": "kind", "domain": "place"}, "class", streaming=True)


def test_a_class_that_nobody_tests_is_refused(frame: pd.DataFrame) -> None:
    path = write(frame[(frame.kind != "cow") | (frame.split != "test")], "a.jsonl")
    with pytest.raises(InputError, match=r"classes \[2\] of cow-dog without test examples"):
        hf({"path": path}, {"label": "kind"}, "class", 2, streaming=True)


def test_of_two_held_out_splits_one_is_tested_on(frame: pd.DataFrame) -> None:
    frame.loc[frame.index % 7 == 1, "split"] = "validation"
    path, words = write(frame, "a.jsonl"), {"columns": {"domain": "place"}, "context": 16}
    for one, two in zip(
        hf({"path": path}, **words), hf({"path": path}, **words, streaming=True), strict=True
    ):
        assert torch.equal(one.test.tensors[0], two.test.tensors[0])
