"""Rows of any data set of the ``datasets`` library: where they are, what their columns mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from cl_moe.errors import InputError
from cl_moe.seeds import generator
from tasks import cells, hub
from tasks.features import Categories, features_of
from tasks.sources import folders

T = TypeVar("T")
TESTS = ("test", "validation", "valid", "dev")


@dataclass(frozen=True)
class Columns:
    """What the columns of a table mean.

    Args:
        input: one column of texts or of images; or a list of columns of numbers and of categories (texts:
            a feature for each).
        label: the classes, by name; None: texts are language to predict.
        domain: what an experience is; None: there is one, or classes are split.
        split: a column that says train or test (or validation); None: the data come split, or it is called
            ``split``.
        standardize: whether listed columns are given mean 0 and deviation 1, by the training data of the
            experience that arrives first.
    """

    input: str | Sequence[str] = "text"
    label: str | None = None
    domain: str | None = None
    split: str | None = None
    standardize: bool = False

    @classmethod
    def of(cls, options: Mapping[str, object]) -> Columns:
        """From a configuration's mapping."""
        return from_options(cls, options, "stream.columns")

    def __post_init__(self) -> None:
        for key in ("label", "domain", "split"):
            _check_word(getattr(self, key), f"stream.columns.{key}", "a column's name, or null")
        listed = [self.input] if isinstance(self.input, str) else list(self.input or ())
        if not listed or not all(isinstance(name, str) for name in listed):
            allowed = "a column, or a list of columns of numbers"
            raise InputError(got=f"{self.input!r}", allowed=allowed, key="stream.columns.input")
        if self.standardize is not False and (self.standardize is not True or isinstance(self.input, str)):
            allowed = "true beside a list of columns of numbers, or false"
            raise InputError(got=f"{self.standardize!r}", allowed=allowed, key="stream.columns.standardize")


@dataclass(frozen=True)
class Split:
    """One side of a data set, read.

    Args:
        what: its name, for errors.
        texts: one per row; empty where inputs are numbers.
        numbers: (n, ...) float32 images or numbers; None where inputs are texts.
        labels: names of classes, one per row; empty without.
        domains: one per row; empty without.
        categories: of input columns of texts beside others, by column.
        places: of its rows in the file, for errors; None: they are all of it.
    """

    what: str
    texts: list[str] = field(repr=False)
    numbers: Tensor | None = field(repr=False)
    labels: list[str] = field(repr=False)
    domains: list[str] = field(repr=False)
    categories: Categories = field(default_factory=dict, repr=False)
    places: Sequence[int] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.texts) if self.numbers is None else len(self.numbers)


@dataclass(frozen=True)
class Source:
    """Where rows are.

    Args:
        path: a name on the hub (``owner/name``); a file (parquet, csv, tsv, json, jsonl, txt, arrow) or a
            list of files; or a folder of images, a subfolder per class. Files are looked for in the working
            folder, in ``CL_MOE_DATA``, and in the project's own data.
        config: which of a hub data set's versions.
        train: the hub's split to learn from.
        test: the hub's split to test on, or a file (or a list, or a folder); None: the hub's ``test`` or else
            ``validation``.
        test_share: of the rows, drawn by ``seed.data`` for testing, from each class and domain alike, where
            nothing else tells them apart; None: such data are refused.
    """

    path: str | Sequence[str]
    config: str | None = None
    train: str = "train"
    test: str | Sequence[str] | None = None
    test_share: float | None = None

    @classmethod
    def of(cls, options: Mapping[str, object]) -> Source:
        """From a configuration's mapping."""
        return from_options(cls, options, "stream.source")

    def __post_init__(self) -> None:
        listed = [self.path] if isinstance(self.path, str) else list(self.path or ())
        if not listed or not all(isinstance(name, str) and name for name in listed):
            allowed = "a data set on the hub, a file, a list of files, or a folder of images"
            raise InputError(got=f"{self.path!r}", allowed=allowed, key="stream.source.path")
        _check_word(self.config, "stream.source.config", "a version's name, or null")
        share = self.test_share
        if share is not None and (
            isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 1
        ):
            raise InputError(
                got=f"{share!r}", allowed="a number in (0, 1), or null", key="stream.source.test_share"
            )

    def splits(self, columns: Columns, seed: int) -> tuple[Split, Split]:
        """Training and test rows.

        Raises:
            InputError: something cannot be read, or nothing says what the test rows are.
        """
        local = [found for name in self._paths(self.path) if (found := local_file(name)) is not None]
        if not local:
            return self._of_hub(columns)
        if len(local) != len(self._paths(self.path)):
            missing = next(name for name in self._paths(self.path) if local_file(name) is None)
            raise no_such_source(missing, "stream.source.path")
        table, what = hub.from_files(local, "stream.source.path"), ", ".join(map(str, local))
        if self.test is not None:
            others = self._paths(self.test)
            paths = [found for name in others if (found := local_file(name)) is not None]
            if len(paths) != len(others):
                raise no_such_source(next(n for n in others if local_file(n) is None), "stream.source.test")
            other = hub.from_files(paths, "stream.source.test")
            train_rows = read(table, columns, what)
            return train_rows, read(other, columns, ", ".join(map(str, paths)), train_rows)
        return self._divided(table, columns, what, seed)

    @staticmethod
    def _paths(given: str | Sequence[str]) -> list[str]:
        return [given] if isinstance(given, str) else list(given)

    def _of_hub(self, columns: Columns) -> tuple[Split, Split]:
        name, key = self.path, "stream.source.path"
        if not isinstance(name, str) or name.count("/") > 1 or name.startswith((".", "/")) or "." in name:
            raise no_such_source(name if isinstance(name, str) else name[0], key)
        local = "its files, downloaded: stream.source.path=[file.parquet, ...]"
        found = hub.from_hub(name, self.config, local, key)
        test = str(self.test or next((split for split in TESTS if split in found), "test"))
        for split, where in ((self.train, "train"), (test, "test")):
            if split not in found:
                raise InputError(
                    got=f"{name} with splits {', '.join(found)}",
                    allowed=f"the name of one of them to {where} on",
                    key=f"stream.source.{where}",
                )
        train = read(found[self.train], columns, name)
        return train, read(found[test], columns, f"{name}, {test}", train)

    def _divided(self, table: Any, columns: Columns, what: str, seed: int) -> tuple[Split, Split]:
        """One table in two: by a column, or by drawing."""
        key = "stream.columns.split"
        split = columns.split
        if split is None and self.test_share is None and "split" in table.features:
            split = "split"
        if split is not None:
            sides = cells.texts_of(table, split, what, key)
            tests = next((name for name in TESTS if name in sides), None)
            chosen = [
                [row for row, side in enumerate(sides) if side == wanted] for wanted in ("train", tests)
            ]
            if tests is None or not chosen[0]:
                raise InputError(
                    got=f"{what} with splits {sorted(set(sides))}",
                    allowed="train, and test or validation",
                    key=key,
                )
        elif self.test_share is not None:
            whole = read(table, columns, what)
            groups: dict[tuple[str, ...], list[int]] = {}
            for row in range(len(whole)):
                own = [names[row] for names in (whole.labels, whole.domains) if names]
                groups.setdefault(tuple(own), []).append(row)
            chosen = _drawn(list(groups.values()), self.test_share, seed)
        else:
            raise InputError(
                got=f"{what}, in which nothing says what to test on",
                allowed="stream.source.test=FILE, stream.columns.split=COLUMN or stream.source.test_share=.2",
                key="stream.source.test",
            )
        learnt = read(table.select(chosen[0]), columns, what, None, chosen[0])
        return learnt, read(table.select(chosen[1]), columns, what, learnt, chosen[1])


def read(
    table: Any, columns: Columns, what: str, like: Split | None = None, places: Sequence[int] | None = None
) -> Split:
    """The columns of a table that a stream is made of; of test rows with ``like``, the training rows.

    Raises:
        InputError: no rows, a missing column, a value that is missing or of a wrong kind (its row is named,
            as one of the file where ``places`` says which it is).
    """
    if not len(table):
        raise InputError(got=f"{what} without rows", allowed="at least one", key="stream.source.path")

    def names(meaning: str) -> list[str]:
        column = getattr(columns, meaning)
        return cells.texts_of(table, column, what, f"stream.columns.{meaning}", places) if column else []

    key, texts, numbers, categories = "stream.columns.input", list[str](), None, Categories()
    if not isinstance(columns.input, str):
        known = None if like is None else like.categories
        numbers, categories = features_of(table, list(columns.input), what, key, known, places)
    elif type(table.features.get(columns.input)).__name__ == "Image":
        numbers = cells.pixels_of(table, columns.input, what, key, places)
    else:
        texts = cells.texts_of(table, columns.input, what, key, places)
    return Split(what, texts, numbers, names("label"), names("domain"), categories, places)


def _drawn(groups: Sequence[Sequence[int]], share: float, seed: int) -> list[list[int]]:
    """Rows to learn from and rows to test on, each in the table's order; at least one of each per group."""
    train: list[int] = []
    test: list[int] = []
    for number, rows in enumerate(groups):
        order = torch.randperm(len(rows), generator=generator(seed, number, "test share")).tolist()
        count = max(1, round(share * len(rows)))
        if count >= len(rows):
            raise InputError(
                got=f"{len(rows)} rows of one class and domain, {share} of them to test on",
                allowed="rows left on both sides",
                key="stream.source.test_share",
            )
        test += [rows[place] for place in order[:count]]
        train += [rows[place] for place in order[count:]]
    return [sorted(train), sorted(test)]


def files_of(given: str | Sequence[str], key: str) -> list[Path] | None:
    """Paths of local files; None for a name on the hub.

    Raises:
        InputError: one of them is neither.
    """
    names = [given] if isinstance(given, str) else list(given)
    found = [local_file(name) for name in names]
    if all(found):
        return [path for path in found if path is not None]
    missing = next(name for name, path in zip(names, found, strict=True) if path is None)
    if len(names) > 1 or missing.count("/") != 1 or missing.startswith((".", "/")) or "." in missing:
        raise no_such_source(missing, key)
    return None


def local_file(name: str) -> Path | None:
    """A file or folder of that name: in the working folder, or in the data folders."""
    if Path(name).exists():
        return Path(name)
    places = [folder / name for folder in folders()] if Path(name).name == name else []
    return next((place for place in places if place.is_file()), None)


def no_such_source(name: str, key: str) -> InputError:
    """The refusal of a name that is neither here nor on the hub."""
    return InputError(
        got=f"{name!r}, which is no file or folder here or in the data folders, and no name on the hub",
        allowed="owner/name of a data set on the hub, an existing file, or a folder of images",
        key=key,
    )


def _check_word(value: object, key: str, allowed: str) -> None:
    if value is not None and not (isinstance(value, str) and value):
        raise InputError(got=f"{value!r}", allowed=allowed, key=key)


def from_options(kind: type[T], options: Mapping[str, object], key: str) -> T:
    """A data class from a configuration's mapping, with its unknown keys refused."""
    known = [entry.name for entry in fields(kind)]  # type: ignore[arg-type]
    if not isinstance(options, Mapping):
        raise InputError(got=f"{options!r}", allowed="{key: value, ...}", key=key)
    for name in options:
        if name not in known:
            raise InputError(got=f"{key}.{name}", allowed=", ".join(known), key=f"{key}.{name}")
    if "path" in known and options.get("path") is None:
        raise InputError(got="no path", allowed="a data set on the hub, or files", key=f"{key}.path")
    return kind(**{str(name): value for name, value in options.items()})
