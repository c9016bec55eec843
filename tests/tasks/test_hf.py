"""Any data set as a stream: files of every format, columns of every kind, and what is wrong with bad ones."""

from __future__ import annotations

import socket
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from cl_moe.errors import InputError
from tasks.hf import hf

LABELS = ["ant", "bee", "cow", "dog"]
CLASSES: dict[str, Any] = {"scenario": "class", "classes_per_experience": 2, "context": 12}


@pytest.fixture
def frame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pd.DataFrame:
    monkeypatch.chdir(tmp_path)
    count = 40
    return pd.DataFrame(
        {
            "text": [f"text {number}" for number in range(count)],
            "kind": [LABELS[number % 4] for number in range(count)],
            "place": ["here", "there"] * (count // 2),
            "split": ["train", "train", "train", "train", "validation"] * (count // 5),
            "x": np.arange(count) / 2,
            "y": np.arange(count),
        }
    )


def write(frame: pd.DataFrame, name: str) -> str:
    suffix = Path(name).suffix
    if suffix == ".parquet":
        frame.to_parquet(name)
    elif suffix == ".jsonl":
        frame.to_json(name, orient="records", lines=True)
    elif suffix == ".arrow":
        from datasets import Dataset

        Dataset.from_pandas(frame).save_to_disk("saved")
        (Path("saved") / "data-00000-of-00001.arrow").rename(name)
    else:
        frame.to_csv(name, index=False, sep="\t" if suffix == ".tsv" else ",")
    return name


def examples(stream: Any, side: str) -> Counter[tuple[str, str]]:
    pairs: Counter[tuple[str, str]] = Counter()
    for experience in stream:
        inputs, targets = getattr(experience, side).tensors
        words = [bytes(row).rstrip(b"\x00").decode() for row in inputs.tolist()]
        pairs.update(zip(words, [LABELS[label] for label in targets.tolist()], strict=True))
    return pairs


@pytest.mark.parametrize("name", ["a.parquet", "a.csv", "a.tsv", "a.jsonl", "a.arrow"])
def test_every_format_gives_the_same_stream(frame: pd.DataFrame, name: str, no_network: None) -> None:
    columns = {"input": "text", "label": "kind"}
    stream = hf({"path": write(frame, name)}, columns, **CLASSES)
    assert [e.name for e in stream] == ["ant-bee", "cow-dog"]
    for side, split in (("train", "train"), ("test", "validation")):
        part = frame[frame.split == split]
        assert examples(stream, side) == Counter(zip(part.text, part.kind, strict=True))


def test_test_rows_may_be_a_file_or_drawn(frame: pd.DataFrame) -> None:
    columns = {"input": "text", "label": "kind"}
    paths = {"path": write(frame[:20], "a.csv"), "test": write(frame[20:], "b.csv")}
    stream = hf(paths, columns, **CLASSES)
    assert sum(examples(stream, "train").values()) == sum(examples(stream, "test").values()) == 20
    source = {"path": write(frame, "c.csv"), "test_share": 0.2}
    drawn = hf(source, columns, **CLASSES)
    train, test = examples(drawn, "train"), examples(drawn, "test")
    assert train + test == Counter(zip(frame.text, frame.kind, strict=True))
    assert Counter(label for _, label in test) == dict.fromkeys(LABELS, 2)
    assert examples(hf(source, columns, data_seed=1, **CLASSES), "test") != test


def test_numbers_by_domain(frame: pd.DataFrame) -> None:
    frame["kind"] = [LABELS[number // 2 % 2] for number in range(40)]
    source = {"path": write(frame, "a.parquet"), "test_share": 0.2}
    stream = hf(source, {"input": ["x", "y"], "label": "kind", "domain": "place"})
    assert [e.name for e in stream] == ["here", "there"]
    assert (stream.input_shape, stream.num_classes, stream.scenario) == ((2,), 2, "domain")
    seen = torch.cat([side.tensors[0] for e in stream for side in (e.train, e.test)])
    assert sorted(seen.tolist()) == sorted(frame[["x", "y"]].astype(float).values.tolist())


@pytest.mark.parametrize("tokenizer", [None, {"kind": "bpe", "vocab_size": 262}])
def test_texts_without_labels_are_language(frame: pd.DataFrame, tokenizer: Any) -> None:
    columns = {"input": "text", "domain": "place", "split": "split"}
    path = write(frame, "a.parquet")
    stream = hf({"path": path}, columns, context=16, order=["there", "here"], tokenizer=tokenizer)
    assert (stream.kind, [e.name for e in stream]) == ("language", ["there", "here"])
    for experience in stream:
        tokens = [t for t in experience.train.tensors[1].flatten().tolist() if t != -100]
        tokens.insert(0, int(experience.train.tensors[0][0, 0]))
        text = b"".join(stream.vocabulary[t] for t in tokens) if tokenizer else bytes(tokens)
        mine = frame[(frame.place == experience.name) & (frame.split == "train")]
        assert text.decode() == "".join(mine.text)


def test_a_text_file_keeps_its_lines(frame: pd.DataFrame) -> None:
    Path("a.txt").write_text("one\ntwo\n\nthree\n")
    Path("b.txt").write_text("four\n")
    (only,) = hf({"path": "a.txt", "test": "b.txt"}, {"input": "text"})
    inputs, targets = only.train.tensors
    assert bytes([int(inputs[0, 0]), *[t for t in targets[0].tolist() if t >= 0]]) == b"one\ntwo\n\nthree\n"


@pytest.mark.parametrize(
    ("words", "key"),
    [
        ({"num_experiences": 2}, "stream.num_experiences"),
        ({"transform": {"kind": "rotated", "degrees": [5]}, **CLASSES}, "stream.transform"),
        ({"transform": {"kind": "permuted"}, "scenario": "class"}, "stream.scenario, stream.transform or"),
    ],
)
def test_changes_that_cannot_be_are_refused(frame: pd.DataFrame, words: dict, key: str) -> None:
    source = {"path": write(frame, "a.csv"), "test_share": 0.2}
    with pytest.raises(InputError) as caught:
        hf(source, {"input": "text", "label": "kind", "split": None}, **words)
    assert caught.value.key.startswith(key)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "text,kind\ncaf\xe9,ant\n".encode("latin-1")),
        ("a.txt", "caf\xe9\n".encode("latin-1")),
        ("a.parquet", b"PAR1 nothing PAR1"),
        ("a.jsonl", b'{"text": "a"\n'),
        ("a.arrow", b"no arrow"),
        ("a.csv", b""),
    ],
)
def test_a_damaged_file_is_named(frame: pd.DataFrame, name: str, content: bytes) -> None:
    Path(name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        hf({"path": name, "test_share": 0.5}, {"input": "text"})
    assert caught.value.got.startswith(f"{name}, which cannot be read")
    assert caught.value.key == "stream.source.path"


@pytest.mark.parametrize(
    ("source", "columns", "others", "key"),
    [
        ({}, {"input": "body"}, {}, "stream.columns.input"),
        ({}, {"label": "sort"}, CLASSES, "stream.columns.label"),
        ({}, {"domain": "room"}, {}, "stream.columns.domain"),
        ({}, {"split": "side"}, {}, "stream.columns.split"),
        ({}, {"split": "place"}, {}, "stream.columns.split"),
        ({}, {"inputs": "text"}, {}, "stream.columns.inputs"),
        ({}, {"input": []}, {}, "stream.columns.input"),
        ({}, {"input": ["x", "text"], "label": "kind"}, CLASSES, "stream.columns.input"),
        ({}, {"input": ["x"]}, {}, "stream.columns.label"),
        ({}, {"label": "kind"}, {}, "stream.columns.domain"),
        ({}, {"label": "kind", "domain": "place"}, {"scenario": "domain"}, "stream.scenario"),
        ({}, {"label": "kind"}, {**CLASSES, "context": 3}, "stream.context or stream.truncate"),
        ({"path": "b.csv", "test_share": None}, {}, {}, "stream.source.test"),
        ({"test_share": 1}, {}, {}, "stream.source.test_share"),
        ({"test_share": 0.99}, {"label": "kind"}, CLASSES, "stream.source.test_share"),
        ({"path": "absent.csv"}, {}, {}, "stream.source.path"),
        ({"path": ["a.csv", "absent.csv"]}, {}, {}, "stream.source.path"),
        ({"path": "a.xlsx"}, {}, {}, "stream.source.path"),
        ({"path": None}, {}, {}, "stream.source.path"),
        ({"test": "absent.csv"}, {}, {}, "stream.source.test"),
        ({"trust_remote_code": True}, {}, {}, "stream.source.trust_remote_code"),
    ],
)
def test_what_is_refused(frame: pd.DataFrame, source: dict, columns: dict, others: dict, key: str) -> None:
    write(frame, "a.csv")
    write(frame.drop(columns="split"), "b.csv")
    Path("a.xlsx").write_bytes(b"")
    with pytest.raises(InputError) as caught:
        hf({"path": "a.csv", "test_share": 0.2, **source}, {"input": "text", **columns}, **others)
    assert caught.value.key == key


@pytest.mark.parametrize(("column", "row"), [("text", 7), ("kind", 3), ("x", 11)])
def test_a_missing_value_is_named_by_its_row(frame: pd.DataFrame, column: str, row: int) -> None:
    frame.loc[row, column] = None
    source = {"path": write(frame, "a.parquet"), "test_share": 0.2}
    columns = {"input": ["x", "y"] if column == "x" else "text", "label": "kind"}
    with pytest.raises(InputError, match=f"row {row} "):
        hf(source, columns, **CLASSES)


@pytest.mark.parametrize("streaming", [False, True])
def test_text_that_is_no_utf8_inside_a_file_is_named(frame: pd.DataFrame, streaming: bool) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    texts = pa.array([b"fine", b"fine", b"caf\xe9"] * 2, type=pa.binary()).view(pa.string())
    parquet.write_table(pa.table({"text": texts, "split": ["train", "test"] * 3}), "a.parquet")
    with pytest.raises(InputError) as caught:
        hf({"path": "a.parquet"}, {"input": "text"}, streaming=streaming)
    assert caught.value.got.startswith("a.parquet")
    assert streaming or "no UTF-8 text in row 2 of column 'text'" in caught.value.got


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("text", "word"), [("", "empty"), ("a\0b", "byte 0"), ("much too long", "13 tokens")]
)
def test_a_labelled_text_that_cannot_be_is_named_by_its_row(
    frame: pd.DataFrame, text: str, word: str, streaming: bool
) -> None:
    frame.loc[21, "text"] = text
    columns = {"input": "text", "label": "kind", "split": "split"}
    with pytest.raises(InputError, match=rf"a\.parquet, row 21.*{word}"):
        hf({"path": write(frame, "a.parquet")}, columns, **CLASSES, streaming=streaming)


def test_a_class_on_one_side_only_is_refused(frame: pd.DataFrame) -> None:
    for gone, side in (("cow", "validation"), ("dog", "train")):
        part = frame[(frame.kind != gone) | (frame.split != side)]
        with pytest.raises(InputError, match="cow-dog without"):
            hf(
                {"path": write(part, "a.csv")},
                {"input": "text", "label": "kind", "split": "split"},
                **CLASSES,
            )


def test_a_hub_that_is_away_is_told_at_once(frame: pd.DataFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def away(*_: object, **__: object) -> None:
        asked.append(1)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", away)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it waits for the hub"))
    with pytest.raises(InputError) as caught:
        hf({"path": "nobody/nothing"}, {"input": "text"})
    assert 1 <= len(asked) <= 2  # not the library's five attempts
    assert "the hub cannot be reached" in caught.value.got
    assert "downloaded" in caught.value.allowed


def test_offline_is_believed(monkeypatch: pytest.MonkeyPatch, no_network: None) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE"):
        hf({"path": "nobody/nothing"}, {"input": "text"})
