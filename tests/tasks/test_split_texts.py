"""Split texts: windows of the texts, each under the label of its text."""

from __future__ import annotations

import pytest
import torch

from cl_moe.errors import InputError
from tasks.split_texts import split_texts
from tasks.text_domains import read_domain

SMALL = {"context": 16, "train_windows": 30, "test_windows": 7}
NAMES = ["novels_en", "python_code", "bible_en", "brown_press", "bible_es", "brown_learned"]


def test_windows_come_from_their_text_at_even_distances() -> None:
    stream = split_texts(domains=NAMES[:4], **SMALL)
    assert (stream.kind, stream.num_classes, stream.input_shape) == ("classification", 4, (16,))
    assert [item.name for item in stream] == ["novels_en-python_code", "bible_en-brown_press"]
    for item in stream:
        for split, data, count in zip(("train", "test"), (item.train, item.test), (30, 7), strict=True):
            inputs, targets = data.tensors
            assert inputs.dtype == targets.dtype == torch.int64
            assert torch.bincount(targets)[list(item.classes)].tolist() == [count, count]
            for label in item.classes:
                text = read_domain(NAMES[label], "text")[split == "test"]
                whole = len(text) // 16
                places = [whole * window // count for window in range(count)]
                expected = [list(text[16 * place : 16 * place + 16]) for place in places]
                assert inputs[targets == label].tolist() == expected


@pytest.mark.parametrize("scenario", ["class", "task", "domain"])
def test_what_a_scenario_gives_away(scenario: str) -> None:
    stream = split_texts(scenario, NAMES, 2, **SMALL)
    labels = [(0, 1)] * 3 if scenario == "domain" else [(0, 1), (2, 3), (4, 5)]
    assert [item.classes for item in stream] == labels
    assert [item.task_label for item in stream] == ([0, 1, 2] if scenario == "task" else [None] * 3)
    assert stream.num_classes == (2 if scenario == "domain" else 6)
    for item in stream:
        assert set(item.train.tensors[1].tolist()) == set(item.test.tensors[1].tolist()) == set(item.classes)


def test_a_label_is_for_life_whatever_the_order() -> None:
    natural, moved = split_texts(**SMALL), split_texts(order=NAMES[::-1], **SMALL)
    assert [item.classes for item in moved] == [(5, 4), (3, 2), (1, 0)]
    first, last = natural[0].train.tensors, moved[-1].train.tensors
    for label in (0, 1):
        assert torch.equal(*(inputs[targets == label] for inputs, targets in (first, last)))


@pytest.mark.parametrize("cut", [2, 3])
def test_cutting_loses_and_doubles_no_window(cut: int, rows) -> None:
    whole, parts = split_texts(**SMALL), split_texts(cut=cut, data_seed=4, **SMALL)
    assert len(parts) == cut * len(whole)
    assert rows(item.train for item in parts) == rows(item.train for item in whole)


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"scenario": "other"}, "stream.scenario"),
        ({"domains": []}, "stream.domains"),
        ({"domains": ["novels_xx"]}, "stream.domains"),
        ({"classes_per_experience": 4}, "stream.classes_per_experience"),
        ({"classes_per_experience": 1, "scenario": "task"}, "stream.classes_per_experience"),
        ({"context": 0}, "stream.context"),
        ({"train_windows": 10_000_000}, "stream.train_windows"),
        ({"test_windows": 0}, "stream.test_windows"),
        ({"order": ["novels_en"]}, "stream.order"),
        ({"tune_on_first": 9}, "stream.tune_on_first"),
    ],
)
def test_what_is_refused(arguments: dict, key: str) -> None:
    with pytest.raises(InputError) as caught:
        split_texts(**arguments)
    assert caught.value.key.startswith(key)


def test_offline(no_network: None) -> None:
    assert len(split_texts(**SMALL)) == 3
