"""Held-out texts: windows, and passages whose last word is asked for, in bytes and in byte pairs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cl_moe.errors import InputError
from cl_moe.stream import ASKED, IGNORE, HeldOut
from tasks.held_out import held_out_texts
from tasks.text_domains import text_domains
from tasks.tokens import BytePairs, Bytes

LINES = ["The cat sat on the mat, and then it slept.", 'He said: "I am going home!" ', "one two"]


@pytest.fixture
def lambada(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("lambada.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in LINES))
    return "lambada.jsonl"


def spelled(held: HeldOut, tokens: Bytes | BytePairs) -> list[tuple[str, str]]:
    """What each passage shows before its word, and the word that is asked for."""
    assert held.passages is not None
    found = []
    for inputs, targets in zip(*held.passages.tensors, strict=True):
        asked = (targets >= ASKED) & (targets < 2 * ASKED)
        first, last = asked.nonzero().squeeze(1)[[0, -1]].tolist()
        assert asked[first : last + 1].all()
        assert targets[last + 1] == 2 * ASKED, "the end of the word is asked for, too"
        assert (targets[last + 2 :] == IGNORE).all()
        assert torch.equal(targets[: last + 1] % ASKED, inputs[1 : last + 2]), "targets are what comes next"
        vocabulary = tokens.vocabulary or tuple(bytes([byte]) for byte in range(256))
        word = b"".join(vocabulary[token] for token in (targets[asked] - ASKED).tolist())
        before = b"".join(vocabulary[token] for token in inputs[: first + 1].tolist())
        found.append((before.decode(), word.decode()))
    return found


@pytest.mark.parametrize("pairs", [False, True])
def test_each_row_of_a_file_is_a_passage(lambada: str, pairs: bool) -> None:
    tokens = BytePairs(LINES, 262) if pairs else Bytes()
    (held,) = held_out_texts({"lambada": {"path": lambada, "passages": True}}, tokens, 64)
    assert held.text is None
    assert spelled(held, tokens) == [
        ("The cat sat on the mat, and then it", " slept"),
        ('He said: "I am going', " home"),
        ("one", " two"),
    ]
    (short,) = held_out_texts({"lambada": {"path": lambada, "passages": True}}, tokens, 8)
    whole = spelled(held, tokens)
    for row, (before, word) in enumerate(spelled(short, tokens)):
        assert (whole[row][0].endswith(before), word) == (True, whole[row][1]), "the last tokens are shown"


def test_a_text_gives_windows_and_the_last_words_of_its_sentences() -> None:
    stream = text_domains(["novels_en"], held_out=["brown_press", "python_code"], train_bytes=900)
    press, _ = stream.held_out
    assert press.text is not None
    assert (press.text.tensors[1] != IGNORE).sum() == 19_999
    words = [word for _, word in spelled(press, Bytes())]
    assert len(words) == 100
    assert len(set(words)) > 50, "from all of the text"
    assert all(word[1:].isalpha() and word[0] == " " for word in words)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        (["novels_en", "novels_en"], "stream.held_out"),
        (["absent"], "stream.held_out.absent.path"),
        (["experience_01"], "stream.held_out"),
        ({"a/b": {}}, "stream.held_out"),
        ({"a": 3}, "stream.held_out.a"),
        ({"a": {"file": "x"}}, "stream.held_out.a.file"),
        ({"a": {"path": "novels_en.parquet", "split": "odd"}}, "stream.held_out.a.split"),
        ({"a": {"path": "novels_en.parquet", "column": "odd"}}, "stream.held_out.a.column"),
        ({"a": {"path": "novels_en.parquet", "last_words": 10**6}}, "stream.held_out.a.last_words"),
        ({"a": {"path": "novels_en.parquet", "bytes": 1}}, "stream.held_out.bytes"),
        ({"a": {"path": "lambada.jsonl", "split": "test"}}, "stream.held_out.a.split"),
        ({"a": {"path": "lambada.jsonl", "passages": True}}, "stream.held_out.a"),
        ({"a": {"path": "nobody/nothing"}}, "stream.held_out.a.path"),
    ],
)
def test_what_is_refused(lambada: str, options: object, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    Path(lambada).write_text('{"text": "word"}\n')
    with pytest.raises(InputError) as caught:
        held_out_texts(options, Bytes(), 128)  # type: ignore[arg-type]
    assert caught.value.key == key


def test_a_word_that_fills_the_context_is_refused(lambada: str) -> None:
    with pytest.raises(InputError, match="slept"):
        held_out_texts({"a": {"path": lambada, "passages": True}}, Bytes(), 6)
