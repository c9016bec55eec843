"""Rows that are read while they are learnt: two blocks in memory, whatever the size of the files.

A first pass counts rows and tokens and notes where each block begins; so an experience has a size and a
checksum, and a run that was interrupted finds its next batch. The library's shuffle buffer is not used, since
no state keeps it: the order is drawn within blocks (``batches.Order``).

Legend: n rows of an experience, B rows of a block, S tokens per row.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cl_moe.errors import InputError
from tasks import cells, hub
from tasks.streamed_inputs import Inputs, Texts
from tasks.tables import Columns
from tasks.tokens import windows

KEY = "stream.source.path"


class Row(NamedTuple):
    """A row of a table: its place, its input, its class and its domain, "" where there is none.

    The input is a text, the bytes of an image (a uint8 tensor), or a tuple of numbers and categories; None
    where it was not asked for.
    """

    place: int
    value: Any
    label: str
    domain: str


@dataclass(frozen=True)
class Table:
    """Rows of the training data, from any place on.

    Args:
        open: gives the library's iterable data set.
        columns: what its columns mean.
        what: its name, for errors.
        only: a column, and what it holds in the rows that are meant; None: all rows are.
    """

    open: Callable[[], Any]
    columns: Columns
    what: str
    only: tuple[str, Sequence[str]] | None = None

    @cached_property
    def of_images(self) -> bool:
        """Whether the input is a column of images."""
        if not isinstance(self.columns.input, str):
            return False
        with hub.quiet():
            return type((self.open().features or {}).get(self.columns.input)).__name__ == "Image"

    def rows(self, first: int = 0, inputs: bool = True) -> Iterator[Row]:
        """The rows from place ``first`` on; with ``inputs`` or, sooner, without.

        Raises:
            InputError: a missing column, a row without a value (named), or what cannot be read.
        """
        for place, row in enumerate(self.raw(first), start=first):
            if self.only is None or row.get(self.only[0]) in self.only[1]:
                told = (self._name(row, place, meaning) for meaning in ("label", "domain"))
                yield Row(place, self._input(row, place) if inputs else None, *told)

    def raw(self, first: int = 0) -> Iterator[dict[str, Any]]:
        """The rows as the library gives them, but for images, which are not decoded.

        Raises:
            InputError: what cannot be read.
        """
        with hub.quiet():
            place = first
            try:
                table = self._opened()
                for row in table.skip(first) if first else table:
                    yield row
                    place += 1
            except (InputError, GeneratorExit):
                raise
            except Exception as error:  # each format's reader has its own family of errors
                raise InputError(
                    got=f"{self.what}, which cannot be read from row {place} on: "
                    f"{cells.first_line(error.__cause__ or error)}",
                    allowed="readable files with UTF-8 text",
                    key=KEY,
                ) from error

    @cached_property
    def names(self) -> dict[str, list[str]]:
        """Of the classes of columns that hold their numbers."""
        with hub.quiet():
            features = self.open().features or {}
        return {column: f.names for column, f in features.items() if getattr(f, "names", None)}

    def _opened(self) -> Any:
        if not self.of_images:
            return self.open()
        from datasets import Image

        # bytes are decoded here, row by row, so that a damaged image can be named
        return self.open().cast_column(str(self.columns.input), Image(decode=False))

    def _input(self, row: dict[str, Any], place: int) -> Any:
        wanted = self.columns.input
        if not isinstance(wanted, str):
            return tuple(self._cell(row, name, "input") for name in wanted)
        value = self._cell(row, wanted, "input")
        if self.of_images:
            return self._image(value, place)
        if isinstance(value, str):
            return value
        raise self._odd(value, place, wanted, "input", "a text in every row, or a column of images")

    def _image(self, value: Any, place: int) -> Tensor:
        from datasets import Image

        try:
            return cells.as_bytes(Image().decode_example(value))
        except Exception as error:  # a decoder may fail in any way
            path = f" ({value['path']})" if isinstance(value, dict) and value.get("path") else ""
            raise InputError(
                got=f"{self.what}: the image in row {place}{path} cannot be decoded: "
                f"{cells.first_line(error)}",
                allowed="readable images",
                key="stream.columns.input",
            ) from error

    def _name(self, row: dict[str, Any], place: int, meaning: str) -> str:
        column = getattr(self.columns, meaning)
        if column is None:
            return ""
        value = self._cell(row, column, meaning)
        if isinstance(value, int) and column in self.names:
            return self.names[column][value]
        if isinstance(value, str | int):
            return str(value)
        raise self._odd(value, place, column, meaning, "a text or a whole number in every row")

    def _cell(self, row: dict[str, Any], column: str, meaning: str) -> Any:
        if column not in row:
            raise InputError(
                got=f"{self.what} with columns {', '.join(row)}",
                allowed=f"a column {column!r}",
                key=f"stream.columns.{meaning}",
            )
        return row[column]

    def _odd(self, value: object, place: int, column: str, meaning: str, allowed: str) -> InputError:
        what = "nothing" if value is None else type(value).__name__
        return InputError(
            got=f"{self.what}: {what} in row {place} of column {column!r}",
            allowed=allowed,
            key=f"stream.columns.{meaning}",
        )


@dataclass
class Part:
    """The rows of one experience, counted, and read block by block.

    Args:
        table: where they are.
        belongs: whether a row is one of them.
        inputs: makes tensors of them; of language, texts.
        block: B.
        number: of each class, by its name; empty for language.
        first: whether it is the experience that arrives first.

    Attributes:
        starts: for each block the place of its first row, and the tokens of it that belong to the one before.
        total: tokens (language), or rows.
        counts: rows by class.
        checksum: CRC-32 of all inputs and labels.
    """

    table: Table
    belongs: Callable[[Row], bool]
    inputs: Inputs
    block: int
    number: dict[str, int] = field(default_factory=dict)
    first: bool = False

    def __post_init__(self) -> None:
        self.starts: list[tuple[int, int]] = []
        self.total, self.checksum = 0, 0
        self.counts: Counter[int] = Counter()
        self._rows: Iterator[Row] = iter(())
        self._rest = torch.zeros(0, dtype=torch.int64)
        self._next = -1

    @property
    def step(self) -> int:
        """What a block takes of the total."""
        return self.block if self.number else self.block * self.texts.context

    @property
    def texts(self) -> Texts:
        """The inputs of language."""
        assert isinstance(self.inputs, Texts)
        return self.inputs

    def count(self, row: Row) -> None:
        """Take up a row of the first pass, if it is one of these."""
        if not self.belongs(row):
            return
        size = 1 if self.number else len(self.texts.tokens.encode(row.value.encode()))
        while len(self.starts) * self.step < self.total + size:
            self.starts.append((row.place, len(self.starts) * self.step - self.total))
        self.total += size
        value = self.inputs.note(row.value, f"{self.table.what}, row {row.place}", self.first)
        self.checksum = zlib.crc32(f"{row.label}\0".encode() + value + b"\0", self.checksum)
        if self.number:
            self.counts[self.number[row.label]] += 1

    @property
    def num_rows(self) -> int:
        """n: examples, or windows, of which the last may be padded."""
        return self.total if self.number else max(0, -(-(self.total - 1) // self.texts.context))

    def read(self, block: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a block; the one behind the last that was read comes at once.

        Raises:
            InputError: the file ends before what was counted.
        """
        first, drop = self.starts[block]
        if block != self._next:
            self._rows = (row for row in self.table.rows(first) if self.belongs(row))
            self._rest = torch.zeros(0, dtype=torch.int64)
        else:
            drop = 0
        self._next = block + 1
        if self.number:
            return self._examples(min(self.block, self.total - block * self.block))
        return self._text(min(self.step + 1, self.total - block * self.step), drop)

    def _examples(self, count: int) -> tuple[Tensor, Tensor]:
        rows = [self._row() for _ in range(count)]
        what = f"{self.table.what}, from row {rows[0].place} on"
        inputs = self.inputs.batch([row.value for row in rows], what, [row.place for row in rows])
        return inputs, torch.tensor([self.number[row.label] for row in rows])

    def _text(self, count: int, drop: int) -> tuple[Tensor, Tensor]:
        pieces, have = [self._rest], len(self._rest)
        while have < count:
            piece = self.texts.tokens.encode(self._row().value.encode())[drop:]
            pieces.append(piece)
            have, drop = have + len(piece), 0
        joined = torch.cat(pieces)
        self._rest = joined[count - 1 :]  # the last token is the first of the next block
        inputs, targets = windows(joined[:count], self.texts.context).tensors
        return inputs, targets

    def _row(self) -> Row:
        row = next(self._rows, None)
        if row is None:
            raise InputError(
                got=f"{self.table.what} with fewer rows than when the run began",
                allowed="the same data",
                key=KEY,
            )
        return row
