"""Text domains: every byte but the first is predicted exactly once, in order, and is what the file holds."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import TensorDataset

from cl_moe.errors import InputError
from cl_moe.stream import IGNORE
from tasks import sources
from tasks.text_domains import text_domains
from tasks.tokens import windows

BROWN = ["brown_press", "brown_fiction", "brown_learned", "brown_general"]
BUNDLED = ["novels_en", "bible_en", "bible_es", "python_code", *BROWN]
DEFAULT = ["novels_en", "bible_en", "python_code"]


def spelled(data: TensorDataset) -> bytes:
    """The text that windows were cut from: the first input byte, then every target in order."""
    inputs, targets = data.tensors
    return bytes([int(inputs[0, 0]), *targets[targets != IGNORE].tolist()])


def text_of(name: str, split: str) -> bytes:
    table = pd.read_parquet(sources.find(f"{name}.parquet"))
    return "".join(table[table.split == split].text).encode()


@given(st.binary(min_size=2, max_size=300), st.integers(1, 70))
def test_every_byte_but_the_first_is_predicted_once(text: bytes, context: int) -> None:
    inputs, targets = windows(text, context).tensors
    real = targets != IGNORE
    assert inputs.shape == targets.shape == (-(-(len(text) - 1) // context), context)
    assert inputs.dtype == targets.dtype == torch.int64
    assert bytes(targets[real].tolist()) == text[1:]
    assert bytes(inputs[real].tolist()) == text[:-1]
    flat = real.flatten().long()
    assert (flat.diff() <= 0).all()  # padding only at the end
    assert len(flat) - flat.sum() < context
    assert (inputs[~real] == 0).all()


def test_the_default_stream_holds_the_files() -> None:
    stream = text_domains()
    assert [item.name for item in stream] == DEFAULT
    assert (stream.kind, stream.scenario, stream.num_classes) == ("language", "domain", 256)
    assert stream.input_shape == (128,)
    for item in stream:
        assert (item.classes, item.task_label) == ((), None)
        assert spelled(item.train) == text_of(item.name, "train")
        assert spelled(item.test) == text_of(item.name, "validation")


@settings(max_examples=8, deadline=None)
@given(
    context=st.integers(1, 300),
    cut=st.integers(1, 6),
    seed=st.none() | st.integers(0, 99),
    data=st.integers(0, 9),
)
def test_cutting_loses_and_doubles_no_window(context: int, cut: int, seed: int | None, data: int) -> None:
    limits = {"domains": ["novels_en", "python_code"], "train_bytes": 5000, "test_bytes": 700}
    whole = text_domains(context=context, seed=seed, **limits)
    parts = text_domains(context=context, seed=seed, cut=cut, data_seed=data, **limits)
    assert len(parts) == 2 * cut
    for item in whole:
        mine = parts[item.index * cut : (item.index + 1) * cut]
        rows = sorted(row.tolist() for part in mine for row in torch.cat(part.train.tensors, dim=1))
        assert rows == sorted(torch.cat(item.train.tensors, dim=1).tolist())
        assert all(part.test is mine[0].test for part in mine)
        assert spelled(mine[0].test) == spelled(item.test)


@pytest.mark.parametrize("name", BUNDLED)
def test_every_bundled_domain_is_text_without_leaks(name: str) -> None:
    stream = text_domains([name])
    train, test = spelled(stream[0].train).decode(), spelled(stream[0].test).decode()
    assert len(train) > 900_000
    assert 0.02 < len(test) / len(train) < 0.08
    assert sum(char.isalpha() or char.isspace() for char in train) / len(train) > 0.75
    table = pd.read_parquet(sources.find(f"{name}.parquet"))
    assert not set(table[table.split == "train"].text) & set(table[table.split == "validation"].text)


def test_domains_read_like_what_they_are_called() -> None:
    stream = text_domains(["novels_en", "bible_en", "bible_es", "python_code"], test_bytes=60_000)
    words = [spelled(item.test).decode(errors="replace").lower().split() for item in stream]
    for word, home in (("miss", 0), ("yahweh", 1), ("jehová", 2), ("def", 3)):
        assert max(range(4), key=lambda place: words[place].count(word)) == home, word


def test_limits_keep_the_first_bytes() -> None:
    stream = text_domains(["bible_es"], context=10, train_bytes=101, test_bytes=2)
    assert spelled(stream[0].train) == text_of("bible_es", "train")[:101]
    assert len(stream[0].train) == 10
    assert spelled(stream[0].test) == text_of("bible_es", "validation")[:2]


def test_orders() -> None:
    small = {"train_bytes": 100, "test_bytes": 100}
    named = ["python_code", "novels_en", "bible_en"]
    moved = text_domains(order=named, **small)
    assert [item.name for item in moved] == named
    assert [item.index for item in moved] == [0, 1, 2]
    drawn = {tuple(item.name for item in text_domains(seed=seed, **small)) for seed in range(12)}
    assert len(drawn) > 1
    assert all(sorted(names) == sorted(DEFAULT) for names in drawn)
    assert [item.name for item in text_domains(order=named, tune_on_first=2, **small)] == named[:2]


def test_the_users_own_folder_and_column(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: None
) -> None:
    table = {"split": ["train", "validation", "train"], "body": ["aé", "xyz", "b"]}
    pd.DataFrame(table).to_parquet(tmp_path / "mine.parquet")
    monkeypatch.setenv(sources.DATA_VARIABLE, str(tmp_path))
    stream = text_domains(["mine"], context=2, column="body")
    assert spelled(stream[0].train) == "aéb".encode()
    assert spelled(stream[0].test) == b"xyz"
    with pytest.raises(InputError, match="split, body") as caught:
        text_domains(["mine"])
    assert caught.value.key == "stream.column"
    assert "'text'" in caught.value.allowed


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"split": ["train"], "text": ["abc"]}, "0 bytes of mine, validation"),
        ({"split": ["train", "validation"], "text": ["a", "abc"]}, "1 bytes of mine, train"),
        ({"split": ["train", "test"], "text": ["abc", "abc"]}, "splits"),
        ({"text": ["abc"]}, "a column 'split'"),
    ],
)
def test_files_that_make_no_domain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: dict, message: str
) -> None:
    pd.DataFrame(table).to_parquet(tmp_path / "mine.parquet")
    monkeypatch.setenv(sources.DATA_VARIABLE, str(tmp_path))
    with pytest.raises(InputError, match=message) as caught:
        text_domains(["mine"])
    assert caught.value.key == "stream.domains"


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"domains": []}, "stream.domains"),
        ({"domains": "novels_en"}, "stream.domains"),
        ({"domains": ["novels_en", "novels_en"]}, "stream.domains"),
        ({"domains": [1]}, "stream.domains"),
        ({"domains": ["novels_xx"]}, "stream.domains"),
        ({"context": 0}, "stream.context"),
        ({"train_bytes": 1}, "stream.train_bytes"),
        ({"train_bytes": 10_000_000}, "stream.train_bytes"),
        ({"test_bytes": 1_000_000}, "stream.test_bytes"),
        ({"test_bytes": "all"}, "stream.test_bytes"),
        ({"order": ["novels_en"]}, "stream.order"),
        ({"order": DEFAULT, "seed": 0}, "stream.order or seed.order"),
        ({"cut": 0}, "stream.cut"),
        ({"tune_on_first": 4}, "stream.tune_on_first"),
    ],
)
def test_what_is_refused(arguments: dict, key: str) -> None:
    with pytest.raises(InputError) as caught:
        text_domains(**arguments)
    assert caught.value.key.startswith(key)
    assert caught.value.got
    assert caught.value.allowed


def test_an_asked_length_is_told_the_length_there_is() -> None:
    with pytest.raises(InputError, match=str(len(text_of("novels_en", "train")))):
        text_domains(train_bytes=10_000_000)


@pytest.mark.parametrize("language", ["en", "de", "fr", "es"])
def test_manual_pages(language: str, monkeypatch: pytest.MonkeyPatch, named_data: str | None) -> None:
    if named_data is None:
        pytest.skip(f"man_{language}.parquet: no CL_MOE_DATA")
    monkeypatch.setenv(sources.DATA_VARIABLE, named_data)
    if f"man_{language}" not in sources.available():
        pytest.skip(f"man_{language}.parquet is not in CL_MOE_DATA")
    stream = text_domains([f"man_{language}"])
    assert len(spelled(stream[0].train).decode()) > 1_500_000


def test_offline(no_network: None) -> None:
    assert len(text_domains(train_bytes=1000, test_bytes=1000)) == 3
