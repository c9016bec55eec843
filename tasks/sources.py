"""Raw data, offline first: the one place that knows where files lie and how they are read."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cl_moe.errors import InputError

DATA_VARIABLE = "CL_MOE_DATA"
_SUBFOLDERS = ("", "may_bundle", "tests_only")
_PACKAGE_DATA = Path(__file__).parent / "data"


def folders() -> tuple[Path, ...]:
    """Where files may lie, first match wins: ``CL_MOE_DATA``, its subfolders, then the package's own.

    Raises:
        InputError: ``CL_MOE_DATA`` is set, but no folder.
    """
    named = os.environ.get(DATA_VARIABLE)
    if not named:
        return (_PACKAGE_DATA,)
    root = Path(named)
    if not root.is_dir():
        raise InputError(
            got=f"{DATA_VARIABLE}={named}, which is no folder",
            allowed="an existing folder with data files, or no such variable",
            key=f"the environment variable {DATA_VARIABLE}",
        )
    return (*(root / part for part in _SUBFOLDERS), _PACKAGE_DATA)


def available(suffix: str = ".parquet") -> tuple[str, ...]:
    """Names, without the suffix, of the files that ``find`` would find; sorted."""
    return tuple(sorted({path.stem for folder in folders() for path in folder.glob(f"*{suffix}")}))


def find(name: str, key: str = "stream") -> Path:
    """The path of a data file, e.g. ``find("novels_en.parquet")``.

    Args:
        name: a bare file name; a path is refused, so that nothing outside the data folders is ever read.
        key: the configuration key to change when the file is missing.

    Raises:
        InputError: no such file; the message names it and ``CL_MOE_DATA``.
    """
    searched = folders()
    if Path(name).name == name:
        for folder in searched:
            if (folder / name).is_file():
                return folder / name
    raise InputError(
        got=f"no file {name!r} in {', '.join(str(folder) for folder in searched)}",
        allowed=", ".join(available(Path(name).suffix)) or f"a folder in {DATA_VARIABLE} that holds the file",
        key=f"{key}, or the environment variable {DATA_VARIABLE} (a folder with more data)",
    )


def read_parquet(path: Path, columns: Sequence[tuple[str, str]]) -> dict[str, list[str]]:
    """Text columns of a parquet file, in the file's order.

    Args:
        path: the file, as ``find`` gave it.
        columns: pairs (column, configuration key that named it).

    Raises:
        InputError: the file is no readable parquet, lacks a column, or a column is not UTF-8 text.
    """
    import datasets

    was_quiet = datasets.are_progress_bars_disabled()
    verbosity = datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what goes wrong is told by the InputError
    try:
        # The library prepares an Arrow copy first. In a folder of its own it can be neither stale nor shared
        # with another process, and nothing stays behind.
        with tempfile.TemporaryDirectory(prefix="cl_moe_") as cache:
            table = datasets.Dataset.from_parquet(str(path), cache_dir=cache, keep_in_memory=True)
            _check_columns(path, table, columns)
            result = {column: table[column][:] for column, _ in columns}
    except InputError:
        raise
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        if getattr(error.__cause__ or error, "errno", None) == errno.ENOSPC:
            raise  # the disk is full: no fault of the file
        raise InputError(
            got=f"{path}, which cannot be read: {error.__cause__ or error}",
            allowed="a parquet file with UTF-8 text",
            key=f"the file, or the environment variable {DATA_VARIABLE}",
        ) from error
    finally:
        datasets.logging.set_verbosity(verbosity)
        if not was_quiet:
            datasets.enable_progress_bars()
    for column, key in columns:
        if (row := next((i for i, text in enumerate(result[column]) if text is None), None)) is not None:
            raise InputError(got=f"{path}: no {column!r} in row {row}", allowed="text in every row", key=key)
    return result


def _check_columns(path: Path, table: object, columns: Sequence[tuple[str, str]]) -> None:
    features = getattr(table, "features")  # noqa: B009 - the library is imported late and carries no types
    for column, key in columns:
        if column not in features:
            raise InputError(
                got=f"{path} with columns {', '.join(features)}", allowed=f"a column {column!r}", key=key
            )
        if getattr(features[column], "dtype", None) not in ("string", "large_string"):
            raise InputError(
                got=f"{path}: column {column!r} of type {features[column]}",
                allowed="a column of UTF-8 text",
                key=key,
            )


@dataclass(frozen=True)
class Images:
    """A labelled image set: inputs (n, 64) float32 in [0, 1], targets (n,) int64."""

    train_inputs: Tensor
    train_targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor


def digits() -> Images:
    """scikit-learn's 8 x 8 digits, flat, pixels / 16: 1,437 training and 360 test images of ten classes.

    The split is always the same stratified 80/20 one (``random_state=0``), so that numbers compare with those
    of other libraries on this data; no seed of a run moves an image from one side to the other.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    split = train_test_split(pixels / 16, labels, test_size=0.2, random_state=0, stratify=labels)
    train_pixels, test_pixels, train_labels, test_labels = split
    return Images(
        torch.tensor(train_pixels, dtype=torch.float32),
        torch.tensor(train_labels, dtype=torch.int64),
        torch.tensor(test_pixels, dtype=torch.float32),
        torch.tensor(test_labels, dtype=torch.int64),
    )
