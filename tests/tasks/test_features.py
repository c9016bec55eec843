"""Tables of numbers and categories: features against pandas, scaled by what arrives first alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from cl_moe.errors import InputError
from tasks.hf import hf

COLUMNS: dict[str, Any] = {"input": ["x", "colour", "y"], "label": "kind", "domain": "place"}


@pytest.fixture
def frame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pd.DataFrame:
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "x": draw.normal(5, 3, 60),
            "colour": ["red", "blue", "green"] * 20,
            "y": np.full(60, 2),
            "kind": ["a", "b"] * 30,
            "place": ["here"] * 30 + ["there"] * 30,
            "split": ["train", "train", "train", "train", "test", "test"] * 10,
        }
    )


def test_categories_become_features_in_their_place(frame: pd.DataFrame) -> None:
    frame.to_csv("a.csv", index=False)
    stream = hf({"path": "a.csv"}, COLUMNS)
    assert stream.input_shape == (5,)
    hot = pd.get_dummies(frame[["x", "colour", "y"]], columns=["colour"])
    hot = hot[["x", "colour_blue", "colour_green", "colour_red", "y"]].astype("float32")
    for experience, place in zip(stream, ("here", "there"), strict=True):
        for side, split in ((experience.train, "train"), (experience.test, "test")):
            rows = hot[(frame.place == place) & (frame.split == split)].to_numpy()
            assert torch.equal(side.tensors[0], torch.tensor(rows))


@pytest.mark.parametrize("order", [["here", "there"], ["there", "here"]])
def test_only_what_arrives_first_sets_the_scale(frame: pd.DataFrame, order: list[str]) -> None:
    frame.loc[frame.place == "there", "x"] += 100
    frame.to_csv("a.csv", index=False)
    plain = hf({"path": "a.csv"}, COLUMNS, order=order)
    scaled = hf({"path": "a.csv"}, {**COLUMNS, "standardize": True}, order=order)
    first = plain[0].train.tensors[0].numpy()
    mean, deviation = first.mean(0), first.std(0)
    deviation[deviation == 0] = 1  # y does not vary
    for one, two in zip(plain, scaled, strict=True):
        for before, after in ((one.train, two.train), (one.test, two.test)):
            expected = (before.tensors[0].numpy() - mean) / deviation
            np.testing.assert_allclose(after.tensors[0].numpy(), expected, rtol=1e-4, atol=1e-5)
            assert torch.equal(before.tensors[1], after.tensors[1])
    assert scaled[1].train.tensors[0][:, 0].mean().abs() > 10, "a drift stays visible"


def test_what_does_not_vary_at_first_keeps_its_unit(frame: pd.DataFrame) -> None:
    frame["y"] = np.where(frame.place == "here", 0.1, 0.2)
    pd.concat([frame] * 50).to_csv("a.csv", index=False)  # so often .1 alone has a deviation in float32
    here, there = hf({"path": "a.csv"}, {**COLUMNS, "input": ["y"], "standardize": True})
    assert torch.equal(here.train.tensors[0], torch.zeros(1000, 1))
    torch.testing.assert_close(there.train.tensors[0], torch.full((1000, 1), 0.1))


@pytest.mark.parametrize(
    ("change", "words", "key", "got"),
    [
        ({"colour": "grey"}, {}, "stream.columns.input", "'grey' in row 5 of 'colour'"),
        ({"colour": None}, {}, "stream.columns.input", "None in row 5 of 'colour'"),
        ({"x": np.inf}, {}, "stream.columns.input", "inf in row 5 of 'x'"),
        ({}, {"standardize": 1}, "stream.columns.standardize", "1"),
        ({}, {"standardize": True, "input": "colour"}, "stream.columns.standardize", "True"),
        ({}, {"input": ["x", "z"]}, "stream.columns.input", "columns x"),
    ],
)
def test_what_is_refused(
    frame: pd.DataFrame, change: dict[str, Any], words: dict[str, Any], key: str, got: str
) -> None:
    test_row = 5  # the second of the test rows
    for column, value in change.items():
        frame.loc[test_row, column] = value
    frame.to_parquet("a.parquet")
    with pytest.raises(InputError) as caught:
        hf({"path": "a.parquet"}, {**COLUMNS, **words})
    assert (caught.value.key, got in caught.value.got) == (key, True), caught.value
