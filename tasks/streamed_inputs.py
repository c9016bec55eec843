"""Inputs of rows that are streamed: texts, images, or numbers and categories, each row by itself.

A first pass shows every row once (``note``), so whatever cannot be read is told before any training; then
batches are made of any rows.

Legend: n rows, S tokens, F features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cl_moe.errors import InputError
from tasks.features import check_number
from tasks.tokens import BytePairs, Bytes, check_text, padded

KEY = "stream.columns.input"


class Inputs(ABC):
    """How values of rows become tensors."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Of one input; known after the first pass."""

    @abstractmethod
    def note(self, value: Any, where: str, first: bool) -> bytes:
        """Take up a row of the first pass; returns what its checksum is of.

        Args:
            value: of the row.
            where: file and row, for errors.
            first: whether it belongs to the experience that arrives first.

        Raises:
            InputError: it is not of the kind or the size of those before.
        """

    @abstractmethod
    def batch(self, values: Sequence[Any], what: str, places: Sequence[int]) -> Tensor:
        """(n, ...): the inputs of rows, in order; ``what`` and their places name them in errors."""


class Texts(Inputs):
    """Tokens of a text, padded: (n, S) int64.

    Args:
        tokens: of the stream.
        context: S.
        truncate: whether longer texts are cut; if not, they are refused.
        labelled: whether a row's text stands by itself; of language it goes on in the next.
    """

    def __init__(self, tokens: Bytes | BytePairs, context: int, truncate: bool, labelled: bool) -> None:
        self.tokens, self.context, self.truncate, self.labelled = tokens, context, truncate, labelled

    @property
    def shape(self) -> tuple[int, ...]:
        """(S,)."""
        return (self.context,)

    def note(self, value: Any, where: str, first: bool) -> bytes:
        """As the base class says."""
        if self.labelled:
            check_text(value, self.tokens, None if self.truncate else self.context, where)
        return str(value).encode()

    def batch(self, values: Sequence[Any], what: str, places: Sequence[int]) -> Tensor:
        """As the base class says."""
        return padded(values, self.tokens, self.context, self.truncate, what, places)


class Pictures(Inputs):
    """Images of one size: (n, H, W) grey or (n, 3, H, W), float32 in [0, 1]; a value is its bytes."""

    def __init__(self) -> None:
        self._shape: tuple[int, ...] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """(H, W) or (3, H, W)."""
        assert self._shape is not None
        return self._shape

    def note(self, value: Any, where: str, first: bool) -> bytes:
        """As the base class says."""
        self._check(value, where)
        return bytes(value.contiguous().numpy().tobytes())

    def batch(self, values: Sequence[Any], what: str, places: Sequence[int]) -> Tensor:
        """As the base class says."""
        for value, row in zip(values, places, strict=True):
            self._check(value, f"{what}, row {row}")
        return torch.stack(list(values)).to(torch.float32) / 255

    def _check(self, value: Tensor, where: str) -> None:
        self._shape = self._shape or tuple(value.shape)
        if tuple(value.shape) != self._shape:
            raise InputError(
                got=f"{where}: an image of shape {tuple(value.shape)}, the first is {self._shape}",
                allowed="images of one size, all grey or all in colour",
                key=KEY,
            )


class Features(Inputs):
    """Numbers, and a feature per category of columns of texts: (n, F) float32.

    Args:
        columns: in the order of the features.
        standardize: give features mean 0 and deviation 1 by the training rows of the experience that arrives
            first (a feature that does not vary there keeps its unit).
    """

    def __init__(self, columns: Sequence[str], standardize: bool) -> None:
        self.columns, self.standardize = list(columns), standardize
        self.categories: dict[str, dict[str, int]] = {}  # of each column of texts, how often in the first
        self.moments = {name: [0.0, 0.0] for name in self.columns}  # mean, sum of squares about it
        self.num_first, self._begun = 0, False

    @property
    def shape(self) -> tuple[int, ...]:
        """(F,)."""
        return (sum(len(self.categories.get(name, "1")) for name in self.columns),)

    def note(self, value: Any, where: str, first: bool) -> bytes:
        """As the base class says."""
        if not self._begun:
            self.categories = {
                name: {} for name, entry in zip(self.columns, value, strict=True) if isinstance(entry, str)
            }
            self._begun = True
        self.num_first += first
        for name, entry in zip(self.columns, value, strict=True):
            if name in self.categories:
                self._check_text(entry, where, name)
                counts = self.categories[name]
                counts[entry] = counts.get(entry, 0) + first
            else:
                check_number(entry, where, name, KEY)
                if first:  # Welford's recurrence: a row at a time, whatever the blocks
                    mean, squares = self.moments[name]
                    later = mean + (entry - mean) / self.num_first
                    self.moments[name] = [later, squares + (entry - mean) * (entry - later)]
        return repr(value).encode()

    def batch(self, values: Sequence[Any], what: str, places: Sequence[int]) -> Tensor:
        """As the base class says."""
        filled: list[Tensor] = []
        for place, name in enumerate(self.columns):
            entries = [value[place] for value in values]
            wheres = [f"{what}, row {row}" for row in places]
            if name in self.categories:
                filled.append(self._hot(entries, wheres, name))
                continue
            for entry, where in zip(entries, wheres, strict=True):
                check_number(entry, where, name, KEY)
            filled.append(torch.tensor(entries, dtype=torch.float32).unsqueeze(1))
        features_nF = torch.cat(filled, dim=1)
        if not self.standardize:
            return features_nF
        mean_F, deviation_F = self._first()
        return (features_nF - mean_F) / torch.where(deviation_F > 0, deviation_F, 1.0)

    def _hot(self, entries: Sequence[object], wheres: Sequence[str], name: str) -> Tensor:
        """(n, categories): 1 for an entry's category, by the alphabet."""
        known = {category: index for index, category in enumerate(sorted(self.categories[name]))}
        for entry, where in zip(entries, wheres, strict=True):
            if entry not in known:
                raise InputError(got=f"{where}: {entry!r} in {name!r}", allowed="a known category", key=KEY)
        hot = torch.zeros(len(entries), len(known))
        hot[torch.arange(len(entries)), torch.tensor([known[str(entry)] for entry in entries])] = 1
        return hot

    def _first(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation of every feature over the first experience."""
        pairs: list[tuple[float, float]] = []
        for name in self.columns:
            if name in self.categories:
                shares = [count / self.num_first for _, count in sorted(self.categories[name].items())]
                pairs += [(share, (share * (1 - share)) ** 0.5) for share in shares]
            else:
                mean, squares = self.moments[name]
                pairs.append((mean, (squares / self.num_first) ** 0.5))
        mean_F, deviation_F = torch.tensor(pairs, dtype=torch.float32).T
        return mean_F, deviation_F

    @staticmethod
    def _check_text(entry: object, where: str, name: str) -> None:
        if not isinstance(entry, str):
            raise InputError(got=f"{where}: {entry!r} in {name!r}", allowed="a category, a text", key=KEY)
