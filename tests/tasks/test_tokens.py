"""Bytes and byte pairs: what is decoded is what was encoded, and only the first experience is learnt from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cl_moe.errors import InputError
from cl_moe.stream import IGNORE, Stream
from tasks.text_domains import read_domain, text_domains
from tasks.tokens import BytePairs, Bytes, check_tokenizer, padded

TEXT = (
    "the cat sat on the mat, and the rat that the cat sat on ran to the other mat; " * 20,
    "año, 日本\n\n  x",
)
PAIRS = BytePairs(TEXT, 285)
SMALL = {"domains": ["novels_en", "bible_es"], "train_bytes": 30_000, "test_bytes": 5_000, "context": 32}


def decoded(tokens: torch.Tensor, vocabulary: tuple[bytes, ...]) -> bytes:
    return b"".join(vocabulary[token] for token in tokens.tolist())


@given(st.text())
def test_any_text_comes_back(text: str) -> None:
    tokens = PAIRS.encode(text.encode())
    assert decoded(tokens, PAIRS.vocabulary) == text.encode()
    assert not (tokens == 0).any()
    assert bytes(Bytes().encode(text.encode()).tolist()) == text.encode()


def test_the_vocabulary_is_padding_every_byte_and_pairs() -> None:
    assert len(set(PAIRS.vocabulary)) == len(PAIRS.vocabulary) == PAIRS.num_tokens == 285
    assert PAIRS.vocabulary[0] == b""
    assert {bytes([byte]) for byte in range(256)} == set(PAIRS.vocabulary[1:257])
    known = set(PAIRS.vocabulary)
    for word in PAIRS.vocabulary[257:]:
        assert any(word[:cut] in known and word[cut:] in known for cut in range(1, len(word)))
    assert len(PAIRS.encode(TEXT[0].encode())) < len(TEXT[0]) / 2


def test_training_it_twice_gives_the_same_one_whatever_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    assert BytePairs(TEXT, 285).vocabulary == PAIRS.vocabulary


def all_tokens(stream: Stream) -> list[bytes]:
    out = []
    for experience in stream:
        inputs, targets = experience.train.tensors
        flat = targets.flatten()
        tokens = torch.cat([inputs.flatten()[:1], flat[flat != IGNORE]])
        out.append(decoded(tokens, stream.vocabulary))
    return out


def test_a_stream_of_pairs_holds_its_texts_to_the_byte() -> None:
    stream = text_domains(**SMALL, tokenizer={"kind": "bpe", "vocab_size": 400})  # type: ignore[arg-type]
    assert (stream.num_classes, stream.input_shape, len(stream.vocabulary)) == (400, (32,), 400)
    for text, name in zip(all_tokens(stream), ("novels_en", "bible_es"), strict=True):
        assert text == read_domain(name, "text")[0][:30_000].decode("utf-8", "ignore").encode()


def test_it_is_trained_on_what_arrives_first_alone() -> None:
    tokenizer = {"kind": "bpe", "vocab_size": 400}
    spanish_first = text_domains(**SMALL, order=["bible_es", "novels_en"], tokenizer=tokenizer)  # type: ignore[arg-type]
    other = {**SMALL, "domains": ["bible_es", "python_code"]}
    assert text_domains(**other, tokenizer=tokenizer).vocabulary == spanish_first.vocabulary  # type: ignore[arg-type]
    assert text_domains(**SMALL, tokenizer=tokenizer).vocabulary != spanish_first.vocabulary  # type: ignore[arg-type]


def test_bytes_are_bytes_however_they_are_asked_for() -> None:
    plain, named = text_domains(**SMALL), text_domains(**SMALL, tokenizer={"kind": "bytes"})  # type: ignore[arg-type]
    assert plain.vocabulary == named.vocabulary == ()
    assert torch.equal(plain[0].train.tensors[0], named[0].train.tensors[0])


@pytest.mark.parametrize("tokenizer", [Bytes(), PAIRS], ids=["bytes", "pairs"])
def test_padding_stands_behind_a_text_only(tokenizer: Any) -> None:
    rows = padded(["the cat", "sat on the mat"], tokenizer, 10, True, "made")
    for row, text in zip(rows, (b"the cat", b"sat on the mat"), strict=True):
        tokens = tokenizer.encode(text)[:10]
        assert row[: len(tokens)].tolist() == tokens.tolist()
        assert not row[len(tokens) :].any()


@pytest.mark.parametrize(
    ("texts", "what"), [([""], "empty"), (["ok", "\x00"], "byte 0"), (["too long for it"], "row 0")]
)
def test_texts_that_do_not_fit_are_named(texts: list[str], what: str) -> None:
    with pytest.raises(InputError, match=what):
        padded(texts, Bytes(), 8, False, "made")


@pytest.mark.parametrize(
    "options",
    [
        "bpe",
        {},
        {"kind": "words"},
        {"kind": "bpe"},
        {"kind": "bpe", "vocab_size": 256},
        {"kind": "bpe", "vocab_size": 1e3},
        {"kind": "bytes", "vocab_size": 300},
        {"kind": "bpe", "vocab_size": 300, "lower": True},
    ],
)
def test_other_tokenizers_are_refused(options: Mapping[str, object]) -> None:
    with pytest.raises(InputError, match=r"stream\.tokenizer"):
        check_tokenizer(options)


def test_a_text_with_too_few_pairs_says_so() -> None:
    with pytest.raises(InputError, match="at most"):
        BytePairs(["abab"], 1000)
