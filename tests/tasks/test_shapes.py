"""Shapes of time: what arrives when, and that nothing is lost, doubled or leaked on the way."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import TensorDataset

from cl_moe.errors import InputError
from cl_moe.stream import Experience, Stream
from tasks.arrange import finish
from tasks.dealing import shares
from tasks.shapes import Shape, sigmoid

PER_CLASS, TEST = 30, 5


def stream(
    count: int = 3, scenario: Any = "class", per: int = PER_CLASS, kind: Any = "classification"
) -> Stream:
    """Two classes per experience; an input is its own number, which no other example has."""
    made, number = [], 0
    for index in range(count):
        sides = []
        labels = [0, 1] if scenario == "domain" else [2 * index, 2 * index + 1]
        for size in (per, TEST):
            inputs = torch.arange(number, number + 2 * size).double()[:, None]
            number += 2 * size
            sides.append(TensorDataset(inputs, torch.tensor(labels).repeat(size)))
        label = index if scenario == "task" else None
        classes = () if kind == "language" else tuple(labels)
        made.append(Experience(index, f"e{index}", sides[0], sides[1], classes, label))
    return Stream("made", kind, scenario, tuple(made), 2 * count, (1,))


def rows(made: Any, side: str = "train") -> Counter[tuple[float, int]]:
    seen = {id(getattr(e, side)): getattr(e, side) for e in made}.values()
    pairs = (zip(data.tensors[0][:, 0].tolist(), data.tensors[1].tolist(), strict=True) for data in seen)
    return Counter(pair for part in pairs for pair in part)


def numbers(experience: Experience) -> set[float]:
    return set(experience.train.tensors[0][:, 0].tolist())


KEEPING = st.fixed_dictionaries(
    {},
    optional={
        "blurry": st.sampled_from([0.1, 0.5, 0.9]),
        "recurring": st.integers(1, 4),
        "parts": st.integers(2, 9),
        "drift": st.sampled_from(["linear", "sigmoid"]),
        "online": st.booleans(),
    },
).filter(lambda options: "drift" not in options or "parts" in options)


@settings(max_examples=60)
@given(
    KEEPING, st.integers(1, 4), st.integers(0, 99), st.sampled_from(["class", "domain"]), st.integers(1, 3)
)
def test_every_example_arrives_once_and_no_test_data_is_trained_on(
    options: dict, count: int, seed: int, scenario: str, cut: int
) -> None:
    if "drift" in options and not 2 <= count * options.get("recurring", 1) <= options["parts"]:
        return
    made = stream(count, scenario)
    shaped = finish(made, None, cut, seed, options)
    assert rows(shaped) == rows(made)
    assert not rows(shaped) & rows(made, "test")
    assert rows(shaped, "test") <= rows(made, "test")
    assert [e.index for e in shaped] == list(range(len(shaped)))
    for experience in shaped:
        assert len(set(experience.classes)) == len(experience.classes)
        assert set(experience.train.tensors[1].tolist()) <= set(experience.classes)


@given(KEEPING, st.integers(0, 99))
def test_the_seed_alone_decides(options: dict, seed: int) -> None:
    if "drift" in options:
        options = {**options, "recurring": 1, "parts": max(3, options["parts"])}
    one = finish(stream(), None, 1, seed, options)
    torch.manual_seed(5)
    two = finish(stream(), None, 1, seed, options)
    assert [e.name for e in one] == [e.name for e in two]
    for first, second in zip(one, two, strict=True):
        assert all(map(torch.equal, first.train.tensors, second.train.tensors))


@pytest.mark.parametrize(
    "options", [{"blurry": 0.5}, {"recurring": 2}, {"parts": 4}, {"drift": "linear", "parts": 4}]
)
def test_another_seed_deals_otherwise(options: dict) -> None:
    one, two = (finish(stream(), None, 1, seed, options) for seed in (0, 1))
    assert any(numbers(a) != numbers(b) for a, b in zip(one, two, strict=True))


def test_without_options_nothing_changes() -> None:
    made = stream()
    assert Shape.of(None)(made, 0) is made
    assert Shape.of({"online": True})(made, 0) == replace(made, online=True)


def test_recurring_experiences_come_again_with_other_examples() -> None:
    made = stream(3, "task")
    again = finish(made, None, 1, 0, {"recurring": 3})
    assert [e.name for e in again] == [f"e{e} (visit {visit})" for visit in (1, 2, 3) for e in range(3)]
    assert [e.task_label for e in again] == [0, 1, 2] * 3
    assert again.class_groups == made.class_groups
    for index, experience in enumerate(again):
        assert experience.test is made[index % 3].test
        assert experience.classes == made[index % 3].classes
        assert len(experience.train) == 2 * PER_CLASS // 3


@pytest.mark.parametrize("share", [0.1, 0.3])
def test_blurry_boundaries_lend_their_share_evenly(share: float) -> None:
    made = stream(4)
    blurred = finish(made, None, 1, 0, {"blurry": share})
    size = 2 * PER_CLASS
    for experience in blurred:
        kept = numbers(experience) & numbers(made[experience.index])
        assert len(kept) == size - round(share * size)
        guests = [
            len(numbers(experience) & numbers(other)) for other in made if other.index != experience.index
        ]
        assert max(guests) - min(guests) <= 1
        assert experience.test is made[experience.index].test
        assert experience.classes[:2] == made[experience.index].classes


@pytest.mark.parametrize("drift", ["linear", "sigmoid"])
def test_a_drift_between_two_follows_its_curve(drift: str) -> None:
    made, parts = stream(2, "domain", per=500), 11
    drifted = finish(made, None, 1, 0, {"drift": drift, "parts": parts})
    assert len(drifted) == parts
    for part, experience in enumerate(drifted):
        time = part / (parts - 1)
        expected = time if drift == "linear" else sigmoid(time)
        found = len(numbers(experience) & numbers(made[1])) / len(experience.train)
        assert found == pytest.approx(expected, abs=0.02)
        assert experience.test is made[int(found > 0.5)].test


def test_a_drift_over_many_meets_two_neighbours_at_a_time() -> None:
    made = stream(4, "domain", per=200)
    for experience in finish(made, None, 1, 0, {"drift": "linear", "parts": 16}):
        there = [e.index for e in made if numbers(e) & numbers(experience)]
        assert len(there) <= 2
        assert there == list(range(there[0], there[-1] + 1))


def test_parts_know_no_boundary() -> None:
    made = stream(3)
    parts = finish(made, None, 1, 0, {"parts": 4})
    assert [len(e.train) for e in parts] == [45] * 4
    met = [[e.index for e in made if numbers(e) & numbers(part)] for part in parts]
    assert met == [[0], [0, 1], [1, 2], [2]]
    assert all(e.task_label is None for e in parts)


@given(st.sampled_from([0.01, 0.1, 0.5]), st.integers(1, 4))
def test_the_long_tail_is_geometric(ratio: float, count: int) -> None:
    made = stream(count, per=100)
    tail = finish(made, None, 1, 0, {"imbalance": ratio})
    labels = torch.cat([e.train.tensors[1] for e in tail])
    found = torch.bincount(labels, minlength=2 * count).tolist()
    assert found == [max(1, round(100 * ratio ** (c / (2 * count - 1)))) for c in range(2 * count)]
    assert rows(tail) <= rows(made)
    assert rows(tail, "test") == rows(made, "test")


@given(st.sampled_from([0.1, 0.25, 0.5]), st.sampled_from(["class", "task", "domain"]))
def test_label_noise_changes_its_share_of_labels_and_no_input(share: float, scenario: str) -> None:
    made = stream(3, scenario)
    loud = finish(made, None, 1, 0, {"label_noise": share})
    for before, after in zip(made, loud, strict=True):
        assert torch.equal(before.train.tensors[0], after.train.tensors[0])
        changed = before.train.tensors[1] != after.train.tensors[1]
        assert int(changed.sum()) == round(share * len(changed))
        assert set(after.train.tensors[1].tolist()) <= set(before.classes)
        assert after.test is before.test


def test_label_noise_is_even_over_the_other_classes() -> None:
    labels = torch.arange(4).repeat(500)
    data = TensorDataset(torch.arange(2000.0)[:, None], labels)
    made = Stream("m", "classification", "class", (Experience(0, "e", data, data, (0, 1, 2, 3)),), 4, (1,))
    (loud,) = finish(made, None, 1, 0, {"label_noise": 0.6})
    wrong = loud.train.tensors[1][(labels == 0) & (loud.train.tensors[1] != 0)]
    counts = torch.bincount(wrong, minlength=4)[1:].double()
    assert (counts / counts.sum() - 1 / 3).abs().max() < 0.1


@given(st.sampled_from([0.1, 0.2, 0.5]), st.integers(0, 9))
def test_a_validation_split_comes_from_the_training_data_alone(share: float, seed: int) -> None:
    made = stream(3)
    held = finish(made, None, 1, seed, {"validation": share})
    assert rows(held) + rows(held, "test") == rows(made)
    for experience in held:
        counts = torch.bincount(experience.test.tensors[1])[list(experience.classes)]
        assert counts.tolist() == [round(share * PER_CLASS)] * 2


def test_tune_on_first_counts_what_arrives() -> None:
    whole = finish(stream(), None, 1, 0, {"recurring": 2})
    for one, two in zip(finish(stream(), 4, 1, 0, {"recurring": 2}), whole[:4], strict=True):
        assert all(map(torch.equal, one.train.tensors, two.train.tensors))


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=9), st.integers(0, 1000))
def test_shares_add_up_and_are_within_one(weights: list[float], total: int) -> None:
    counts = shares(weights, total)
    assert sum(counts) == total
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - weight / sum(weights) * total) < 1


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"blury": 0.1}, "stream.shape.blury"),
        ({"blurry": 1.0}, "stream.shape.blurry"),
        ({"blurry": "much"}, "stream.shape.blurry"),
        ({"imbalance": 0}, "stream.shape.imbalance"),
        ({"imbalance": True}, "stream.shape.imbalance"),
        ({"label_noise": -0.1}, "stream.shape.label_noise"),
        ({"validation": 0.001}, "stream.shape.validation"),
        ({"recurring": 0}, "stream.shape.recurring"),
        ({"recurring": 1000}, "stream.shape (or stream.cut)"),
        ({"drift": "sudden", "parts": 3}, "stream.shape.drift"),
        ({"drift": "linear"}, "stream.shape.parts"),
        ({"drift": "linear", "parts": 2}, "stream.shape.parts"),
        ({"parts": 1}, "stream.shape.parts"),
        ({"parts": 1000}, "stream.shape (or stream.cut)"),
        ({"online": "yes"}, "stream.shape.online"),
        ("online", "stream.shape"),
    ],
)
def test_what_is_refused(options: Any, key: str) -> None:
    with pytest.raises(InputError) as caught:
        finish(stream(), None, 1, 0, options)
    assert caught.value.key == key


@pytest.mark.parametrize("options", [{"blurry": 0.1}, {"parts": 4}, {"drift": "linear", "parts": 4}])
def test_tasks_are_not_mixed(options: dict) -> None:
    with pytest.raises(InputError, match="task label"):
        finish(stream(3, "task"), None, 1, 0, options)


@pytest.mark.parametrize("options", [{"imbalance": 0.1}, {"label_noise": 0.1}])
def test_language_has_no_classes(options: dict) -> None:
    with pytest.raises(InputError, match="language"):
        finish(stream(3, "domain", kind="language"), None, 1, 0, options)


def test_one_experience_has_nothing_to_drift_to() -> None:
    with pytest.raises(InputError, match="at least two"):
        finish(stream(1), None, 1, 0, {"drift": "linear", "parts": 4})
