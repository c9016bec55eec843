"""Texts that are read while they are learnt: two blocks in memory, whatever the size of the files.

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
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cl_moe.errors import InputError
from tasks import hub
from tasks.tables import Columns
from tasks.tokens import BytePairs, Bytes, padded, windows

KEY = "stream.source.path"


class Row(NamedTuple):
    """A row of a table: its place, its text, its class and its domain, "" where there is none."""

    place: int
    text: str
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

    def rows(self, first: int = 0) -> Iterator[Row]:
        """The rows from place ``first`` on.

        Raises:
            InputError: a missing column, a row without a text (named), or what cannot be read.
        """
        with hub.quiet():
            table = self.open()
            found = iter(table.skip(first) if first else table)
            place = first
            while True:
                try:
                    row = next(found)
                except StopIteration:
                    return
                except Exception as error:  # each format's reader has its own family of errors
                    cause = str(error.__cause__ or error).strip().splitlines()
                    raise InputError(
                        got=f"{self.what}, which cannot be read behind row {place}: {' '.join(cause[:1])}",
                        allowed="readable files with UTF-8 text",
                        key=KEY,
                    ) from error
                if self.only is None or row.get(self.only[0]) in self.only[1]:
                    yield Row(
                        place, *(self._value(row, place, name) for name in ("input", "label", "domain"))
                    )
                place += 1

    def _value(self, row: dict[str, Any], place: int, meaning: str) -> str:
        column = getattr(self.columns, meaning)
        if column is None:
            return ""
        if column not in row:
            raise InputError(
                got=f"{self.what} with columns {', '.join(row)}",
                allowed=f"a column {column!r}",
                key=f"stream.columns.{meaning}",
            )
        value = row[column]
        if isinstance(value, str) or (meaning != "input" and isinstance(value, int)):
            return str(value)
        raise InputError(
            got=f"{self.what}: {type(value).__name__} in row {place} of column {column!r}",
            allowed="a text in every row; images and numbers are not streamed (stream.streaming=false)",
            key=f"stream.columns.{meaning}",
        )


@dataclass
class Part:
    """The rows of one experience, counted, and read block by block.

    Args:
        table: where they are.
        belongs: whether a row is one of them.
        tokens: of the stream.
        context: S.
        block: B.
        number: of each class, by its name; empty for language.
        truncate: whether longer labelled texts are cut.

    Attributes:
        starts: for each block the place of its first row, and the tokens of it that belong to the one before.
        total: tokens (language), or rows.
        counts: rows by class.
        checksum: CRC-32 of all texts and labels.
    """

    table: Table
    belongs: Callable[[Row], bool]
    tokens: Bytes | BytePairs
    context: int
    block: int
    number: dict[str, int] = field(default_factory=dict)
    truncate: bool = False

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
        return self.block if self.number else self.block * self.context

    def count(self, row: Row) -> None:
        """Take up a row of the first pass, if it is one of these."""
        if not self.belongs(row):
            return
        size = 1 if self.number else len(self.tokens.encode(row.text.encode()))
        while len(self.starts) * self.step < self.total + size:
            self.starts.append((row.place, len(self.starts) * self.step - self.total))
        self.total += size
        self.checksum = zlib.crc32(f"{row.label}\0{row.text}\0".encode(), self.checksum)
        if self.number:
            self.counts[self.number[row.label]] += 1

    @property
    def num_rows(self) -> int:
        """n: examples, or windows, of which the last may be padded."""
        return self.total if self.number else max(0, -(-(self.total - 1) // self.context))

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
        inputs = padded([row.text for row in rows], self.tokens, self.context, self.truncate, what)
        return inputs, torch.tensor([self.number[row.label] for row in rows])

    def _text(self, count: int, drop: int) -> tuple[Tensor, Tensor]:
        pieces, have = [self._rest], len(self._rest)
        while have < count:
            piece = self.tokens.encode(self._row().text.encode())[drop:]
            pieces.append(piece)
            have, drop = have + len(piece), 0
        joined = torch.cat(pieces)
        self._rest = joined[count - 1 :]  # the last token is the first of the next block
        inputs, targets = windows(joined[:count], self.context).tensors
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
