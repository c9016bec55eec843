"""A stream that arrives file by file: what is there is learnt, and the run goes on with what comes later."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils.data import TensorDataset

from cl_moe.errors import InputError
from cl_moe.stream import Experience, Scenario, Stream
from tasks.arrange import finish, whole
from tasks.features import standardized
from tasks.held_out import Options, held_out_texts
from tasks.labelled import check_classes, known_scenario
from tasks.shapes import Shape
from tasks.tables import Columns, Source, Split
from tasks.tokens import BytePairs, Bytes, check_tokenizer, encoded_rows, padded, tokenizer_of, windows

_OF_EACH = ("validation", "label_noise", "online")
"""Shapes of time that look at one experience alone."""
_NO_TESTS = "a column called split, stream.columns.split=COLUMN or stream.test_share=.2"
_KEYS = {
    "stream.source.path": "stream.files",
    "stream.source.test": "stream.test_share",
    "stream.source.test_share": "stream.test_share",
}
"""What a single file's reader calls by another name than this stream."""


def arriving(
    files: str,
    columns: Mapping[str, object],
    test_share: float | None = None,
    scenario: str = "domain",
    context: int = 128,
    truncate: bool = False,
    tokenizer: Mapping[str, object] | None = None,
    held_out: Options = None,
    cut: int = 1,
    tune_on_first: int | None = None,
    shape: Mapping[str, object] | None = None,
    data_seed: int = 0,
) -> Stream:
    """An experience per file of a folder, in the order of their names; more files may arrive behind the last.

    ``resume`` goes on with those that have arrived since, and ends with the bits of a run that had all files
    from the start: classes are numbered in order of arrival (the alphabet's within a file), byte pairs are
    learnt from the first file, a row of the matrix measures only what has been learnt by then, and in the
    task-incremental scenario head rows are born with their task. A file that changed, went away, or came
    before one that was learnt is refused.

    Args:
        files: a pattern: ``inbox/*.parquet``; formats as in ``tasks.tables.Source``. Numbers or dates in the
            names keep the order; files are to be moved in whole, under a name that did not match before.
        columns: what their columns mean: see ``tasks.tables.Columns``; there is none for domains.
        test_share: of each file's rows, drawn by ``data_seed`` for testing, where no column (``split``) tells
            test rows; null: such files are refused.
        scenario: with labels ``class``, ``task`` (no class in two files) or ``domain`` (the same classes in
            all); without: ``domain``.
        context: tokens per text or window.
        truncate: whether longer labelled texts are cut; if not, they are refused.
        tokenizer: null: bytes; or as in ``tasks.text_domains``, trained on the first file.
        held_out: without labels: further texts to measure on, as in ``tasks.text_domains``.
        cut: how many shorter experiences each file is cut into.
        tune_on_first: keep only so many files.
        shape: the shape of time, as far as it looks at one experience alone: validation, label_noise,
            online.
        data_seed: draws test rows, and what ``cut`` and ``shape`` draw.

    Raises:
        InputError: no file, a value that is not allowed, or a file that cannot be read (named, with its row).
    """
    setting, meaning = known_scenario(scenario), _columns(columns, scenario)
    size, length = check_tokenizer(tokenizer), whole(context, "stream.context", 1)
    _check_shape(shape)
    paths = _found(files)
    seed, key = whole(data_seed, "seed.data"), "stream.files"
    sides = [_sides(path, test_share, meaning, seed) for path in paths]
    tokens = tokenizer_of(size, sides[0][0].texts)
    names = [path.stem for path in paths]
    if len(set(names)) < len(names):
        raise InputError(got=f"files of one name: {', '.join(names)}", allowed="different names", key=key)
    classes: list[str] = []
    experiences = []
    for index, both in enumerate(sides):
        if meaning.label is None:
            train, test = (_windows(side, tokens, length) for side in both)
            own: tuple[int, ...] = ()
        else:
            classes += sorted({*both[0].labels, *both[1].labels} - set(classes))
            train, test = (_labelled(side, classes, tokens, length, truncate) for side in both)
            own = tuple(train.tensors[1].unique().tolist())
        label = index if setting == "task" else None
        experiences.append(Experience(index, names[index], train, test, own, label))
    stream = _stream(
        standardized(experiences) if meaning.standardize else experiences, setting, classes, tokens
    )
    if not classes:
        stream = replace(stream, held_out=held_out_texts(held_out, tokens, length))
    elif held_out is not None:
        raise InputError(got=f"{held_out!r} beside labels", allowed="null", key="stream.held_out")
    return finish(stream, tune_on_first, cut, seed, shape)


def _found(files: str) -> list[Path]:
    paths = [Path(name) for name in sorted(glob.glob(files)) if Path(name).is_file()]
    if not paths:
        raise InputError(
            got=f"no file {files!r} in {Path.cwd()}",
            allowed="a pattern of files of which at least one has arrived: 'inbox/*.parquet'",
            key="stream.files",
        )
    return paths


def _sides(path: Path, test_share: float | None, meaning: Columns, seed: int) -> tuple[Split, Split]:
    """A file's rows to learn from and to test on; errors name this stream's keys."""
    try:
        return Source(str(path), test_share=test_share).splits(meaning, seed)
    except InputError as error:
        allowed = _NO_TESTS if error.key == "stream.source.test" else error.allowed
        raise InputError(got=error.got, allowed=allowed, key=_KEYS.get(error.key, error.key)) from None


def _columns(columns: Mapping[str, object], scenario: str) -> Columns:
    meaning = Columns.of(columns)
    if meaning.domain is not None:
        allowed = "null: an experience is a file"
        raise InputError(got=f"{meaning.domain!r}", allowed=allowed, key="stream.columns.domain")
    if meaning.label is None and (scenario != "domain" or not isinstance(meaning.input, str)):
        raise InputError(
            got=f"no column of labels, input {meaning.input!r}, scenario {scenario!r}",
            allowed="a column of labels; or a column of texts in scenario domain, for a language model",
            key="stream.columns.label",
        )
    return meaning


def _check_shape(shape: Mapping[str, object] | None) -> None:
    Shape.of(shape)
    if wrong := [name for name in shape or {} if name not in _OF_EACH]:
        raise InputError(
            got=f"{wrong[0]} of a stream whose end is not known",
            allowed=f"what looks at one experience alone: {', '.join(_OF_EACH)}",
            key=f"stream.shape.{wrong[0]}",
        )


def _windows(side: Split, tokens: Bytes | BytePairs, context: int) -> TensorDataset:
    encoded = encoded_rows(side.texts, tokens)
    if len(encoded) < 2:
        raise InputError(
            got=f"{len(encoded)} tokens on one side of {side.what}",
            allowed="at least 2 to learn from and 2 to test on: one and the next",
            key="stream.files",
        )
    return windows(encoded, context)


def _labelled(
    side: Split, classes: Sequence[str], tokens: Bytes | BytePairs, context: int, truncate: bool
) -> TensorDataset:
    inputs = side.numbers
    if inputs is None:
        inputs = padded(side.texts, tokens, context, truncate, side.what, side.places)
    return TensorDataset(inputs, torch.tensor([classes.index(name) for name in side.labels]))


def _stream(
    experiences: Sequence[Experience], scenario: Scenario, classes: Sequence[str], tokens: Bytes | BytePairs
) -> Stream:
    shape = tuple(experiences[0].train.tensors[0].shape[1:])
    for experience in experiences:
        for data in (experience.train, experience.test):
            if tuple(data.tensors[0].shape[1:]) != shape:
                raise InputError(
                    got=f"inputs of shape {tuple(data.tensors[0].shape[1:])} in {experience.name}",
                    allowed=f"{shape}, as in {experiences[0].name}",
                    key="stream.files",
                )
    if classes:
        check_classes(experiences, scenario, classes)
    return Stream(
        name="arriving",
        kind="classification" if classes else "language",
        scenario=scenario,
        experiences=tuple(experiences),
        num_classes=len(classes) or tokens.num_tokens,
        input_shape=shape,
        vocabulary=tokens.vocabulary,
        open=True,
    )
