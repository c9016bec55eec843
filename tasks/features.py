"""Columns of a table as features: numbers as they are, categories as one column each.

Legend: n rows, F features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from cl_moe.errors import InputError
from cl_moe.stream import Experience

Categories = dict[str, tuple[str, ...]]


def features_of(
    table: Any,
    columns: Sequence[str],
    what: str,
    key: str,
    known: Mapping[str, Sequence[str]] | None = None,
    places: Sequence[int] | None = None,
) -> tuple[Tensor, Categories]:
    """(n, F) float32 of columns of numbers and of texts, and the categories of the latter, by the alphabet.

    Args:
        table: of the ``datasets`` library.
        columns: in the order of the features; one of texts gives a feature per category, 1 or 0.
        what: its name, for errors.
        key: the configuration key that named the columns.
        known: categories of the training rows, where this table is another; None where it is theirs.
        places: of the table's rows in its file; None: they are all of it.

    Raises:
        InputError: a missing column, a value that is missing or of another kind, or a category that no
            training row has (its row is named).
    """
    filled: list[Tensor] = []
    categories: Categories = {}
    for name in columns:
        if name not in table.features:
            raise InputError(
                got=f"{what} with columns {', '.join(table.features)}", allowed=f"a column {name!r}", key=key
            )
        values = table[name][:]
        if getattr(table.features[name], "dtype", None) in ("string", "large_string"):
            own = {value for value in values if value is not None}
            categories[name] = tuple(sorted(own)) if known is None else tuple(known.get(name, ()))
            place = {category: index for index, category in enumerate(categories[name])}
            _check(
                values, lambda value, place=place: value in place, what, name, key, "a known category", places
            )
            hot = torch.zeros(len(values), len(place))
            hot[torch.arange(len(values)), torch.tensor([place[value] for value in values])] = 1
            filled.append(hot)
        else:
            _check(values, _is_number, what, name, key, "numbers", places)
            filled.append(torch.tensor(values, dtype=torch.float32).unsqueeze(1))
    return torch.cat(filled, dim=1), categories


def standardized(experiences: Sequence[Experience]) -> tuple[Experience, ...]:
    """Features less their mean, by their deviation, both of the first experience's training data alone.

    What comes later is not looked at, so a drift stays visible. A feature that does not vary there keeps its
    unit.
    """
    seen = experiences[0].train.tensors[0].double()
    mean_F, deviation_F = seen.mean(dim=0).float(), seen.std(dim=0, correction=0).float()
    # looked at itself: rounding gives equal numbers a deviation, too
    scale_F = torch.where((seen != seen[0]).any(dim=0), deviation_F, 1.0)

    def changed(data: TensorDataset) -> TensorDataset:
        return TensorDataset((data.tensors[0] - mean_F) / scale_F, *data.tensors[1:])

    return tuple(replace(e, train=changed(e.train), test=changed(e.test)) for e in experiences)


def check_number(value: object, where: str, name: str, key: str) -> None:
    """Refuse what is no finite number.

    Raises:
        InputError: it is none; ``where`` and the column ``name`` say which.
    """
    if not _is_number(value):
        raise InputError(got=f"{where}: {value!r} in {name!r}", allowed="numbers", key=key)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")


def _check(
    values: Sequence[Any],
    right: Any,
    what: str,
    name: str,
    key: str,
    allowed: str,
    places: Sequence[int] | None,
) -> None:
    for row, value in enumerate(values):
        if not right(value):
            place = row if places is None else places[row]
            raise InputError(got=f"{what}: {value!r} in row {place} of {name!r}", allowed=allowed, key=key)
