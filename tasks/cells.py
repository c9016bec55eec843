"""Columns of a table of the ``datasets`` library: texts, images, names of classes; what is wrong is named.

Legend: n rows, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cl_moe.errors import InputError


def texts_of(table: Any, column: str, what: str, key: str, places: Sequence[int] | None = None) -> list[str]:
    """A column of text; numbers of named classes become their names.

    Args:
        table: of the library.
        column: its name.
        what: the table's name, for errors.
        key: the configuration key that named the column.
        places: where its rows are in the file; None: they are all of it.

    Raises:
        InputError: no such column, another type, a row without a value, or one that is no UTF-8 text.
    """
    feature = feature_of(table, column, what, key)
    try:
        values = table[column][:]
    except UnicodeDecodeError as error:
        place = _place(_undecodable(table, column), places)
        got = f"{what}: no UTF-8 text in row {place} of column {column!r}: {error.reason}"
        raise InputError(got=got, allowed="UTF-8 text in every row", key=key) from error
    if (row := next((row for row, value in enumerate(values) if value is None), None)) is not None:
        got = f"{what}: nothing in row {_place(row, places)} of column {column!r}"
        raise InputError(got=got, allowed="a value", key=key)
    if names := getattr(feature, "names", None):
        return [names[value] for value in values]
    if getattr(feature, "dtype", None) in ("string", "large_string"):
        return values
    if str(getattr(feature, "dtype", "")).startswith(("int", "uint", "bool")):
        return [str(value) for value in values]
    raise InputError(
        got=f"{what}: column {column!r} of type {feature}",
        allowed="a column of text or of whole numbers",
        key=key,
    )


def pixels_of(table: Any, column: str, what: str, key: str, places: Sequence[int] | None = None) -> Tensor:
    """A column of images of one size: (n, H, W), or (n, 3, H, W) in colour, float32 in [0, 1].

    Args:
        table: and the others as in ``texts_of``.
        column: its name.
        what: the table's name.
        key: the configuration key.
        places: of its rows.

    Raises:
        InputError: no such column, an image that cannot be decoded (its row is named), or of another size.
    """
    feature_of(table, column, what, key)
    rows: list[Tensor] = []
    for row in range(len(table)):
        try:
            rows.append(as_bytes(table[row][column]))
        except Exception as error:  # a decoder may fail in any way
            place = _place(row, places)
            raise InputError(
                got=f"{what}: the image in row {place} of {column!r} cannot be decoded: {first_line(error)}",
                allowed="readable images",
                key=key,
            ) from error
        if rows[-1].shape != rows[0].shape:
            raise InputError(
                got=f"{what}: an image of shape {tuple(rows[-1].shape)} in row {_place(row, places)}, the "
                f"first is {tuple(rows[0].shape)}",
                allowed="images of one size, all grey or all in colour",
                key=key,
            )
    return torch.stack(rows).to(torch.float32) / 255


def as_bytes(picture: Any) -> Tensor:
    """A decoded image: (H, W) uint8, or (3, H, W) in colour; of 16 bits a pixel the upper 8.

    Raises:
        ValueError: more bits.
    """
    import numpy as np

    if picture.mode.startswith("I"):  # Pillow's own conversion cuts at 255
        deep = torch.from_numpy(np.array(picture).astype("int64"))
        if not 0 <= deep.min() <= deep.max() < 1 << 16:
            raise ValueError(f"values of {deep.min()} to {deep.max()}, which are not 16 bits a pixel")
        return (deep >> 8).to(torch.uint8)
    wanted = "L" if picture.mode in ("1", "L", "LA") else "RGB"
    pixels = torch.from_numpy(np.array(picture.convert(wanted)))
    return pixels if pixels.dim() == 2 else pixels.permute(2, 0, 1)


def numbers_of(labels: Sequence[str], classes: Sequence[str], what: str, key: str) -> Tensor:
    """(n,) int64: the numbers of classes, found by their names; signs, spaces and case don't count."""
    number = {_plain(name): place for place, name in enumerate(classes)}
    if unknown := sorted({label for label in labels if _plain(label) not in number}):
        raise InputError(got=f"{what} with class {unknown[0]!r}", allowed=", ".join(classes), key=key)
    return torch.tensor([number[_plain(label)] for label in labels], dtype=torch.int64)


def feature_of(table: Any, column: str, what: str, key: str) -> Any:
    """The type of a column.

    Raises:
        InputError: no such column.
    """
    if column not in table.features:
        raise InputError(
            got=f"{what} with columns {', '.join(table.features)}", allowed=f"a column {column!r}", key=key
        )
    return table.features[column]


def first_line(error: BaseException) -> str:
    """Of an error's text; its class where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _plain(name: str) -> str:
    return "".join(sign for sign in name.lower() if sign.isalnum())


def _place(row: int, places: Sequence[int] | None) -> int:
    return row if places is None else places[row]


def _undecodable(table: Any, column: str) -> int:
    """The first row whose text cannot be decoded."""
    for row in range(len(table)):
        try:
            table[row][column]
        except UnicodeDecodeError:
            return row
    return 0
