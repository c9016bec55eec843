"""Intents: published sets by domain or by groups of intents; what is said where a set is not at hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.svm import LinearSVC

from cl_moe.errors import InputError
from cl_moe.stream import Stream
from tasks.intents import INTENT_SETS, Question, intents
from tasks.intents import _with_domains as with_domains
from tasks.sources import find

Need = Callable[[str], None]
PLAUSIBLE = {"clinc150": 0.89, "banking77": 0.89, "hwu64": 0.85, "snips7": 0.98}


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A made set in CLINC's place: three domains of two intents, and questions out of scope."""
    rows = [
        (split, f"{word} {name} number {number}", name, domain)
        for domain, names in {"b": ("b1", "b2"), "a": ("a1", "a2"), "c": ("c1", "c2")}.items()
        for name in names
        for split, count in (("train", 6), ("validation", 2), ("test", 3))
        for number, word in enumerate(["what about"] * count)
    ]
    rows += [("train", "nonsense", "oos", "oos"), ("test", "more of it", "oos", "oos")]
    frame = pd.DataFrame(rows, columns=["split", "text", "label_name", "domain"])
    frame.to_parquet(tmp_path / "clinc150.parquet")
    frame.drop(columns="domain").to_parquet(tmp_path / "snips7.parquet")
    monkeypatch.setenv("CL_MOE_DATA", str(tmp_path))
    return tmp_path


def texts(stream: Stream, side: str) -> list[str]:
    inputs = torch.cat([getattr(e, side).tensors[0] for e in stream])
    return [bytes(row).rstrip(b"\x00").decode("utf-8", "ignore") for row in inputs.tolist()]


@pytest.mark.parametrize("scenario", ["class", "task", "domain"])
def test_a_domain_is_an_experience(small: Path, scenario: str) -> None:
    stream = intents(scenario=scenario, context=32)
    assert [e.name for e in stream] == ["a", "b", "c"]
    assert [e.classes for e in stream] == ([(0, 1)] * 3 if scenario == "domain" else [(0, 1), (2, 3), (4, 5)])
    assert [e.task_label for e in stream] == ([0, 1, 2] if scenario == "task" else [None] * 3)
    assert stream.num_classes == (2 if scenario == "domain" else 6)
    frame = pd.read_parquet(small / "clinc150.parquet")
    for side in ("train", "test"):
        wanted = frame[(frame.split == side) & (frame.label_name != "oos")].text
        assert sorted(texts(stream, side)) == sorted(wanted)


def test_intents_may_be_grouped_as_one_likes(small: Path) -> None:
    names = ["c2", "a1", "b1", "c1", "a2", "b2"]
    stream = intents("snips7", classes_per_experience=3, order=names, context=32)
    assert [e.classes for e in stream] == [(5, 0, 2), (4, 1, 3)]
    assert [e.name for e in stream] == ["c2 .. b1", "c1 .. b2"]


def test_a_tokenizer_learns_from_the_first_domain_alone(small: Path) -> None:
    options = {"kind": "bpe", "vocab_size": 262}
    before = intents(tokenizer=options, context=32, truncate=False).vocabulary
    frame = pd.read_parquet(small / "clinc150.parquet")
    frame.loc[frame.domain == "c", "text"] = "other words altogether"
    frame.to_parquet(small / "clinc150.parquet")
    assert intents(tokenizer=options, context=32).vocabulary == before
    assert intents(tokenizer=options, context=32, order=["c", "a", "b"]).vocabulary != before


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"dataset": "atis"}, "stream.dataset"),
        ({"dataset": "snips7"}, "stream.classes_per_experience"),
        ({"classes_per_experience": 4}, "stream.classes_per_experience"),
        ({"context": 5, "truncate": False}, "stream.context or stream.truncate"),
        ({"context": 0}, "stream.context"),
        ({"order": ["a", "b"]}, "stream.order"),
        ({"scenario": "sentence"}, "stream.scenario"),
    ],
)
def test_what_is_refused(small: Path, arguments: dict[str, Any], key: str) -> None:
    with pytest.raises(InputError) as caught:
        intents(**arguments)
    assert caught.value.key == key


def test_domains_of_unequal_sizes_share_no_labels(small: Path) -> None:
    frame = pd.read_parquet(small / "clinc150.parquet")
    frame[frame.label_name != "a2"].to_parquet(small / "clinc150.parquet")
    assert [len(e.classes) for e in intents()] == [1, 2, 2]
    with pytest.raises(InputError, match="a: 1, b: 2"):
        intents(scenario="domain")


def test_a_class_without_test_data_is_named(small: Path) -> None:
    frame = pd.read_parquet(small / "clinc150.parquet")
    frame[(frame.label_name != "a2") | (frame.split != "test")].to_parquet(small / "clinc150.parquet")
    with pytest.raises(InputError, match=r"classes \[1\] of a without test examples"):
        intents()


@pytest.mark.parametrize("name", INTENT_SETS)
def test_a_set_that_is_not_at_hand_says_where_it_is(
    name: str, monkeypatch: pytest.MonkeyPatch, no_network: None
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError) as caught:
        intents(name, classes_per_experience=7)
    assert f"{name}.parquet" in caught.value.allowed
    assert "CL_MOE_DATA" in caught.value.allowed
    assert INTENT_SETS[name].origin in caught.value.allowed


def test_the_hubs_copy_gets_its_domains_by_name(with_data: Need) -> None:
    with_data("clinc150.parquet")
    frame = pd.read_parquet(find("clinc150.parquet"))
    frame = frame[frame.label_name != "oos"]
    bare = [Question(text, name, "") for text, name in zip(frame.text, frame.label_name, strict=True)]
    assert [question.domain for question in with_domains(bare, "clinc150")] == frame.domain.tolist()


@pytest.mark.parametrize("name", PLAUSIBLE)
def test_a_linear_model_finds_the_intents(name: str, with_data: Need) -> None:
    with_data(f"{name}.parquet")
    groups = {"clinc150": None, "hwu64": None, "banking77": 11, "snips7": 7}
    stream = intents(name, classes_per_experience=groups[name], context=160)
    targets, expected = (
        torch.cat([getattr(e, side).tensors[1] for e in stream]) for side in ("train", "test")
    )
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    train_x, test_x = words.fit_transform(texts(stream, "train")), words.transform(texts(stream, "test"))
    found = LinearSVC().fit(train_x, targets.numpy()).score(test_x, expected.numpy())
    assert found == pytest.approx(PLAUSIBLE[name], abs=0.04)


def test_every_question_of_a_set_arrives(with_data: Need) -> None:
    with_data("hwu64.parquet")
    stream = intents("hwu64", context=160, truncate=False)
    frame = pd.read_parquet(find("hwu64.parquet"))
    for side in ("train", "test"):
        assert sorted(texts(stream, side)) == sorted(frame[frame.split == side].text)
    assert not set(texts(stream, "train")) & set(texts(stream, "test"))
