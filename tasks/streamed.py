"""A stream of any size: training data are read while they are learnt, test data are held."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.utils.data import TensorDataset

from cl_moe.errors import InputError
from cl_moe.stream import Experience, Scenario, Stream, Streamed
from tasks import hub
from tasks.held_out import Options, held_out_texts
from tasks.labelled import check_classes, group_size
from tasks.streamed_inputs import Features, Inputs, Pictures, Texts
from tasks.streaming import KEY, Part, Row, Table
from tasks.tables import TESTS, Columns, Source, files_of, no_such_source
from tasks.tokens import BytePairs, Bytes, encoded_rows, tokenizer_of, windows

Tokens = Bytes | BytePairs


class How(NamedTuple):
    """How texts become tokens, and how many rows are in memory: see ``tasks.hf``."""

    context: int
    truncate: bool
    vocab_size: int | None
    block: int


def streamed(
    source: Source,
    columns: Columns,
    scenario: Scenario,
    per: int | None,
    how: How,
    arrange_names: Callable[[Sequence[str]], list[str]],
    held_out: Options = None,
) -> Stream:
    """The stream that ``tasks.hf`` builds of the same rows, its training data read block by block.

    Args:
        source: hub name or files; its test data are another split or file, or told by a column.
        columns: the input is a column of texts or of images, or columns of numbers and categories.
        scenario: as in ``tasks.hf``.
        per: classes per experience; None: a domain per experience, or all in one.
        how: tokens, and rows per block.
        arrange_names: puts domains or classes into their order.
        held_out: see ``tasks.held_out``.

    Raises:
        InputError: what cannot be streamed, or read.
    """
    train, test = _tables(source, columns)
    labels, domains = _names(train)
    names = labels if per is not None else domains
    arriving = arrange_names(names)
    size = 1 if per is None else group_size(per, len(names), scenario)
    groups = [arriving[start : start + size] for start in range(0, len(arriving), size)]
    place = _place_of(groups, "label" if per is not None else "domain")
    inputs, tokens = _inputs(train, how, place)
    classes = labels if columns.label else []
    numbers = [_numbers(classes, group, per, scenario) for group in groups]
    parts = [
        Part(train, partial(_is_of, place, index), inputs, how.block, number, index == 0)
        for index, number in enumerate(numbers)
    ]
    for row in train.rows():
        parts[place(row)].count(row)
    tests = _tests(test, parts, place)
    experiences = [
        _experience(index, "-".join(group), part, held, scenario)
        for index, (group, part, held) in enumerate(zip(groups, parts, tests, strict=True))
    ]
    if classes:
        check_classes(experiences, scenario, classes)
    whole = size if scenario == "domain" and per is not None else len(classes)
    return Stream(
        name="hf",
        kind="classification" if classes else "language",
        scenario=scenario,
        experiences=tuple(experiences),
        num_classes=whole or tokens.num_tokens,
        input_shape=inputs.shape,
        vocabulary=tokens.vocabulary,
        held_out=held_out_texts(held_out, tokens, how.context),
    )


def _inputs(train: Table, how: How, place: Callable[[Row], int]) -> tuple[Inputs, Tokens]:
    """What makes tensors of the rows; and the tokens, which only texts have."""
    columns = train.columns
    images, listed = train.of_images, not isinstance(columns.input, str)
    if columns.label is None and (images or listed):
        raise InputError(
            got=f"no column of labels beside {'images' if images else 'numbers'}",
            allowed="a column of labels; or a column of texts, for a language model",
            key="stream.columns.label",
        )
    if images:
        return Pictures(), Bytes()
    if listed:
        return Features(list(columns.input), columns.standardize), Bytes()
    first = (row.value for row in train.rows() if place(row) == 0)
    tokens = tokenizer_of(how.vocab_size, first)
    return Texts(tokens, how.context, how.truncate, columns.label is not None), tokens


def _tables(source: Source, columns: Columns) -> tuple[Table, Table]:
    """Training and test rows."""
    if source.test_share is not None:
        raise InputError(
            got=f"test_share={source.test_share} of rows that are streamed",
            allowed="stream.source.test=FILE or a column that tells test rows",
            key="stream.source.test_share",
        )
    paths = files_of(source.path, KEY)
    if paths is None:
        splits = hub.stream_hub(str(source.path), source.config, KEY)
        test = str(source.test or next((name for name in TESTS if name in splits), "test"))
        for name, key in ((source.train, "train"), (test, "test")):
            if name not in splits:
                got = f"{source.path} with splits {', '.join(splits)}"
                raise InputError(got=got, allowed="one of them", key=f"stream.source.{key}")
        return (
            Table(lambda: splits[source.train], columns, str(source.path)),
            Table(lambda: splits[test], columns, f"{source.path}, {test}"),
        )
    opened, what = hub.stream_files(paths, KEY), ", ".join(map(str, paths))
    if source.test is not None:
        others = files_of(source.test, "stream.source.test")
        if others is None:
            raise no_such_source(str(source.test), "stream.source.test")
        named = ", ".join(map(str, others))
        return Table(opened, columns, what), Table(hub.stream_files(others, KEY), columns, named)
    split = columns.split or "split"
    every = Table(opened, columns, what)
    first: Mapping[str, Any] = next(every.raw(), {})
    if split not in first:
        raise InputError(
            got=f"{what}, in which nothing says what to test on",
            allowed="stream.source.test=FILE, or stream.columns.split=COLUMN",
            key="stream.source.test",
        )
    sides = {row.get(split) for row in every.raw()}
    test = next((name for name in TESTS if name in sides), TESTS[0])  # one of them alone, as of held rows
    train = Table(opened, columns, what, (split, ("train",)))
    return train, Table(opened, columns, what, (split, (test,)))


def _names(table: Table) -> tuple[list[str], list[str]]:
    """Classes and domains that there are, by the alphabet; one without a name where no column tells."""
    labels, domains = set(), set()
    for row in table.rows(inputs=False):
        labels.add(row.label)
        domains.add(row.domain)
    if not labels:
        raise InputError(got=f"{table.what} without training rows", allowed="at least one", key=KEY)
    return sorted(labels), sorted(domains)


def _place_of(groups: Sequence[Sequence[str]], meaning: str) -> Callable[[Row], int]:
    """Which experience a row belongs to; -1: none."""
    at = {name: index for index, group in enumerate(groups) for name in group}
    return lambda row: at.get(getattr(row, meaning), -1)


def _is_of(place: Callable[[Row], int], index: int, row: Row) -> bool:
    return place(row) == index


def _numbers(
    classes: Sequence[str], group: Sequence[str], per: int | None, scenario: Scenario
) -> dict[str, int]:
    """The labels of an experience's classes; none for language."""
    if scenario == "domain" and per is not None:
        return {name: label for label, name in enumerate(group)}
    return {name: label for label, name in enumerate(classes)}


def _tests(test: Table, parts: Sequence[Part], place: Callable[[Row], int]) -> list[TensorDataset]:
    """The test data of every experience, held."""
    rows: list[list[Row]] = [[] for _ in parts]
    for row in test.rows():
        index = place(row)
        if index < 0 or (parts[index].number and row.label not in parts[index].number):
            known = any(row.label in part.number for part in parts)
            odd = row.domain if known or not row.label else row.label
            raise InputError(
                got=f"{test.what}: {odd!r} in row {row.place}, which no training row has",
                allowed="classes and domains of the training rows",
                key="stream.source.test",
            )
        rows[index].append(row)
    held = []
    for part, found in zip(parts, rows, strict=True):
        if part.number:
            inputs = part.inputs.batch([r.value for r in found], test.what, [r.place for r in found])
            held.append(TensorDataset(inputs, torch.tensor([part.number[row.label] for row in found]).long()))
        else:
            encoded = encoded_rows((row.value for row in found), part.texts.tokens)
            if len(encoded) < 2:
                raise InputError(got=f"{len(encoded)} tokens", allowed="at least 2 to test on", key=KEY)
            held.append(windows(encoded, part.texts.context))
    return held


def _experience(index: int, name: str, part: Part, test: TensorDataset, scenario: Scenario) -> Experience:
    classes = tuple(sorted(part.counts))
    summary: dict[str, object] = {"train_classes": dict(sorted(part.counts.items()))}
    if not part.number:
        summary = {"train_tokens": max(0, part.total - 1)}
    train = Streamed(part.num_rows, part.block, part.read, part.checksum, summary)
    return Experience(index, name or "all", train, test, classes, index if scenario == "task" else None)
