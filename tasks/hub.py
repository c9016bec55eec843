"""The one way to a data hub and into files of the ``datasets`` library: bounded waits, plain errors.

A data set's own loading script never runs: the library has none any more, and nothing here could ask for one.
"""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.utils.data import TensorDataset

from cl_moe.errors import InputError
from tasks.cells import first_line, numbers_of, pixels_of, texts_of
from tasks.labelled import Labelled

SECONDS = 5.0
"""How long the hub may take to answer at all."""
_FORMATS = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json"}
_FORMATS |= {".txt": "text", ".arrow": "arrow"}


def from_hub(
    name: str, config: str | None, local: str, key: str, streaming: bool = False
) -> Mapping[str, Any]:
    """The splits of a data set on the hub, by name; from the library's cache where the hub is away.

    Args:
        name: ``owner/name``.
        config: one of several versions; None for the only one.
        local: for the error: how to do without the hub.
        key: the configuration key that named it.
        streaming: whether rows are to come as they are read.

    Raises:
        InputError: the hub cannot be reached (told at once, not after the library's five attempts), or has no
            such data set.
    """
    import datasets
    from huggingface_hub import HfApi, constants

    online = not constants.HF_HUB_OFFLINE
    why = "HF_HUB_OFFLINE is set"
    if online:
        try:
            HfApi().dataset_info(name, timeout=SECONDS)
        except Exception as error:  # the client's own classes are not one family, nor the same over versions
            answered = getattr(error, "response", None) is not None
            if answered:
                raise InputError(
                    got=f"{name!r} on the hub: {first_line(error)}",
                    allowed=f"an open data set; or {local}",
                    key=key,
                ) from error
            online, why = False, f"the hub cannot be reached: {first_line(error)}"
    with quiet(), _hub_is(online):
        try:
            return datasets.load_dataset(name, config, streaming=streaming)
        except Exception as error:
            if getattr(error, "errno", None) == errno.ENOSPC:
                raise
            state = "" if online else f" ({why}; it is not in the cache either)"
            raise InputError(
                got=f"{name!r}, which cannot be loaded{state}: {first_line(error)}", allowed=local, key=key
            ) from error


def from_files(paths: Sequence[Path], key: str) -> Any:
    """The rows of local files of one format, or of a folder of images (a subfolder per class), in order.

    Args:
        paths: parquet, csv, tsv, json, jsonl, txt, arrow; or one folder.
        key: the configuration key that named them.

    Raises:
        InputError: another format, a damaged file (named), no rows.
    """
    import datasets

    kinds = {_format(path, key) for path in paths}
    if len(kinds) != 1:
        raise InputError(got=f"files of several formats: {_shown(paths)}", allowed="files of one", key=key)
    kind, tables = kinds.pop(), []
    for path in paths:
        options: dict[str, Any] = {"sep": "\t"} if path.suffix == ".tsv" else {}
        if kind == "text":
            options["keep_linebreaks"] = True
        where = {"data_dir": str(path)} if kind == "imagefolder" else {"data_files": [str(path)]}
        with quiet(), tempfile.TemporaryDirectory(prefix="cl_moe_") as cache:
            try:
                tables.append(
                    datasets.load_dataset(
                        kind, **where, split="train", cache_dir=cache, keep_in_memory=True, **options
                    )
                )
            except Exception as error:  # each format's reader has its own family of errors
                cause = error.__cause__ or error
                if getattr(cause, "errno", None) == errno.ENOSPC:
                    raise
                if "corresponds to no data" in str(cause):
                    raise InputError(got=f"{path} without rows", allowed="at least one", key=key) from error
                raise InputError(
                    got=f"{path}, which cannot be read as {kind}: {first_line(cause)}",
                    allowed=f"a readable {kind} file with UTF-8 text",
                    key=key,
                ) from error
    different = [
        path for path, table in zip(paths, tables, strict=True) if table.features != tables[0].features
    ]
    if different:
        raise InputError(
            got=f"{different[0]}, whose columns are not those of {paths[0]}",
            allowed="the same columns",
            key=key,
        )
    return datasets.concatenate_datasets(tables)


def stream_files(paths: Sequence[Path], key: str) -> Callable[[], Any]:
    """What opens local files of one format, or a folder of images, as an iterable data set, row by row.

    Raises:
        InputError: several formats, or several folders.
    """
    import datasets

    kinds = {_format(path, key) for path in paths}
    if len(kinds) != 1 or (kinds == {"imagefolder"} and len(paths) > 1):
        raise InputError(
            got=f"{_shown(paths)} to be streamed",
            allowed="files of one format (parquet, csv, json, text or arrow), or one folder of images",
            key=key,
        )
    options: dict[str, Any] = {"sep": "\t"} if paths[0].suffix == ".tsv" else {}
    (kind,) = kinds
    if kind == "text":
        options["keep_linebreaks"] = True
    names = [str(path.absolute()) for path in paths]
    where: dict[str, Any] = {"data_dir": names[0]} if kind == "imagefolder" else {"data_files": names}

    def opened() -> Any:
        try:
            return datasets.load_dataset(kind, **where, split="train", streaming=True, **options)
        except Exception as error:  # each format's reader has its own family of errors
            got = f"{_shown(paths)}, which cannot be read as {kind}: {first_line(error.__cause__ or error)}"
            raise InputError(got=got, allowed=f"a readable {kind} file with UTF-8 text", key=key) from error

    return opened


def stream_hub(name: str, config: str | None, key: str) -> Mapping[str, Any]:
    """The splits of a data set on the hub as iterable data sets; nothing but what is read is downloaded.

    Raises:
        InputError: as ``from_hub``.
    """
    return from_hub(name, config, "its files, downloaded: stream.source.path=[file.parquet, ...]", key, True)


def labelled_images(
    name: str, classes: Sequence[str], sizes: tuple[int, int], local: str, key: str
) -> Labelled:
    """The first images of both splits of a set on the hub; classes are matched by name."""
    splits = from_hub(name, None, local, key)
    parts = []
    for split, size in zip(("train", "test"), sizes, strict=True):
        table = splits[split].select(range(size))
        targets = numbers_of(texts_of(table, "label", name, key), classes, name, key)
        parts.append(TensorDataset(pixels_of(table, "image", name, key), targets))
    return Labelled(parts[0], parts[1], tuple(classes))


@contextmanager
def quiet() -> Iterator[None]:
    """The library without progress bars and log lines: what goes wrong is told by an InputError."""
    import datasets

    was_quiet, verbosity = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if not was_quiet:
            datasets.enable_progress_bars()


@contextmanager
def _hub_is(online: bool) -> Iterator[None]:
    """Tell the libraries that the hub is away, so that they look into their cache at once."""
    from datasets import config
    from huggingface_hub import constants

    before = config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    if not online:
        config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


def _format(path: Path, key: str) -> str:
    if path.is_dir():
        return "imagefolder"
    if path.suffix.lower() not in _FORMATS:
        raise InputError(got=f"{path}", allowed=f"a folder of images, or {', '.join(_FORMATS)}", key=key)
    return _FORMATS[path.suffix.lower()]


def _shown(paths: Sequence[Path]) -> str:
    return ", ".join(str(path) for path in paths)
