"""Any data set of the ``datasets`` library as a stream: from the hub, or files; texts, images, or numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.utils.data import TensorDataset

from cl_moe.errors import InputError
from cl_moe.stream import Experience, Scenario, Stream
from tasks.arrange import arrange, finish, whole
from tasks.changing import changed, check_no_count, ways_of_a_whole
from tasks.features import standardized
from tasks.held_out import Options, held_out_texts
from tasks.labelled import Labelled, by_classes, by_domains, group_size, known_scenario
from tasks.streamed import How, streamed
from tasks.tables import Columns, Source, Split
from tasks.tokens import BytePairs, Bytes, check_tokenizer, encoded_rows, padded, tokenizer_of, windows
from tasks.transforms import Transform

Both = tuple[Split, Split]
Arrange = Callable[[Sequence[Any]], list[Any]]


@dataclass(frozen=True)
class Reading:
    """How texts become tokens.

    Args:
        context: tokens per text or window.
        truncate: whether longer labelled texts are cut.
        vocab_size: of a tokenizer to train; None for bytes.
    """

    context: int
    truncate: bool
    vocab_size: int | None


def hf(
    source: Mapping[str, object],
    columns: Mapping[str, object],
    scenario: str = "domain",
    classes_per_experience: int | None = None,
    transform: Mapping[str, object] | None = None,
    num_experiences: int | None = None,
    context: int = 128,
    truncate: bool = False,
    tokenizer: Mapping[str, object] | None = None,
    held_out: Mapping[str, object] | Sequence[str] | None = None,
    order: Sequence[str] | None = None,
    seed: int | None = None,
    cut: int = 1,
    tune_on_first: int | None = None,
    shape: Mapping[str, object] | None = None,
    streaming: bool = False,
    block: int = 1024,
    data_seed: int = 0,
) -> Stream:
    """Experiences by a column of domains, or by groups of classes.

    Without ``columns.label`` texts are language: next-token prediction, one experience per domain, the texts
    of a domain one after the other. With it they are classified, and so are images (float32 in [0, 1]) and
    columns of numbers and categories (float32). Classes are numbered by their names in the alphabet. No code
    of a data set is ever run.

    Args:
        source: where the rows are: see ``tasks.tables.Source``.
        columns: what their columns mean: see ``tasks.tables.Columns``.
        scenario: ``class``, ``task`` or ``domain``; language: ``domain``.
        classes_per_experience: so many classes per experience, a divisor of theirs; null: a domain per
            experience, or all rows under one transformation after the other.
        transform: of images: see ``tasks.transforms.Transform``. Beside domains or groups of classes
            experience i is seen in the i-th way; without either, each experience is all rows in one way.
        num_experiences: how many ways, then, if the transformation lists none (null: 5).
        context: tokens per text or window.
        truncate: whether longer labelled texts are cut; if not, they are refused.
        tokenizer: null: bytes; or as in ``tasks.text_domains``; with labels it takes ``model.vocabulary``.
        held_out: without labels: further texts to measure on; as in ``tasks.text_domains``.
        order: a permutation of the names of the domains, or of the classes, or of the ways' numbers.
        seed: draws that order; null and no ``order``: the alphabet's (0, 1, ..).
        cut: how many shorter experiences each is cut into.
        tune_on_first: keep only so many, for choosing hyperparameters; ``num_classes`` stays.
        shape: the shape of time; see ``tasks.shapes.Shape``.
        streaming: whether rows to learn from are read while they are learnt, two blocks in memory: texts,
            images, numbers and categories. Their order is drawn within blocks, which come one after the
            other. Nothing that needs all rows at once goes with it, nor does ``transform``.
        block: rows (windows) of a block.
        data_seed: draws a test set where ``source.test_share`` asks for one, and what ``cut`` and ``shape``
            draw.

    Raises:
        InputError: a value that is not allowed, or data that cannot be read, with file and row.
    """
    setting, meaning = known_scenario(scenario), Columns.of(columns)
    reading = Reading(whole(context, "stream.context", 1), truncate, check_tokenizer(tokenizer))
    arrange_names = partial(arrange, order=order, seed=seed)
    change = None if transform is None else Transform(transform)
    if change is None or meaning.domain is not None or classes_per_experience is not None:
        check_no_count(num_experiences, "experiences that are told by classes or domains")
    if meaning.label is not None and held_out is not None:
        raise InputError(got=f"{held_out!r} beside labels", allowed="null", key="stream.held_out")
    if streaming:
        _check_streaming(meaning, setting, classes_per_experience, change)
        how = How(reading.context, truncate, reading.vocab_size, whole(block, "stream.block", 1))
        origin = Source.of(source)
        stream = streamed(origin, meaning, setting, classes_per_experience, how, arrange_names, held_out)
        return finish(stream, tune_on_first, cut, data_seed, shape)
    both = Source.of(source).splits(meaning, whole(data_seed, "seed.data"))
    if meaning.label is None:
        _check_language(both[0], setting, classes_per_experience)
        stream = _language(both, reading, arrange_names, held_out)
    elif classes_per_experience is not None:
        stream = _by_classes(both, setting, classes_per_experience, reading, arrange_names)
    elif both[0].domains or change is None:
        stream = _by_domains(both, setting, reading, arrange_names)
    else:
        stream, ways = _by_ways(both, setting, reading, change, num_experiences, arrange_names)
        return finish(changed(stream, change, ways, data_seed), tune_on_first, cut, data_seed, shape)
    if meaning.standardize:
        stream = replace(stream, experiences=standardized(stream.experiences))
    stream = changed(stream, change, range(len(stream)), data_seed)
    return finish(stream, tune_on_first, cut, data_seed, shape)


def _check_streaming(meaning: Columns, scenario: Scenario, per: int | None, change: Transform | None) -> None:
    """Refuse what is not streamed before a row is read."""
    if meaning.label is None and (scenario != "domain" or per is not None):
        _refuse_language(scenario, per)
    if change is not None:
        raise InputError(
            got=f"a transformation ({change.kind}) of images that are streamed",
            allowed="stream.streaming=false, or stream.transform=null",
            key="stream.transform (or stream.streaming)",
        )


def _by_ways(
    both: Both,
    scenario: Scenario,
    reading: Reading,
    change: Transform,
    count: int | None,
    arrange_ways: Arrange,
) -> tuple[Stream, list[int]]:
    """All rows in every experience, and the ways in which they are seen."""
    allowed = "scenario domain; or stream.columns.domain=COLUMN, or stream.classes_per_experience=2"
    ways = arrange_ways(range(ways_of_a_whole(change, scenario, count, allowed)))
    classes, tokens = _classes(both), Bytes()
    data = _labelled(both, classes, tokens, reading)
    numbers = tuple(range(len(classes)))
    experiences = tuple(Experience(i, "", data.train, data.test, numbers) for i in range(len(ways)))
    return _stream(experiences, scenario, len(classes), data, tokens), ways


def _by_domains(both: Both, scenario: Scenario, reading: Reading, arrange_names: Arrange) -> Stream:
    classes, domains = _classes(both), _domains(both)
    arriving = arrange_names(domains)
    pairs = zip(both[0].texts, both[0].domains, strict=False)
    tokens = tokenizer_of(reading.vocab_size, [text for text, name in pairs if name == arriving[0]])
    data = _labelled(both, classes, tokens, reading, domains)
    experiences = by_domains(data, [domains.index(name) for name in arriving], scenario)
    return _stream(experiences, scenario, len(classes), data, tokens)


def _by_classes(both: Both, scenario: Scenario, per: int, reading: Reading, arrange_names: Arrange) -> Stream:
    classes = _classes(both)
    size = group_size(per, len(classes), scenario)
    names = arrange_names(classes)
    groups = [names[start : start + size] for start in range(0, len(names), size)]
    pairs = zip(both[0].texts, both[0].labels, strict=False)
    tokens = tokenizer_of(reading.vocab_size, [text for text, label in pairs if label in groups[0]])
    data = _labelled(both, classes, tokens, reading)
    numbers = [[classes.index(name) for name in group] for group in groups]
    experiences = by_classes(data, numbers, scenario, ["-".join(group) for group in groups])
    return _stream(experiences, scenario, size if scenario == "domain" else len(classes), data, tokens)


def _stream(
    experiences: tuple[Experience, ...],
    scenario: Scenario,
    count: int,
    data: Labelled,
    tokens: Bytes | BytePairs,
) -> Stream:
    vocabulary = tokens.vocabulary
    return Stream("hf", "classification", scenario, experiences, count, data.input_shape, vocabulary)


def _classes(both: Both) -> tuple[str, ...]:
    return tuple(sorted({*both[0].labels, *both[1].labels}))


def _check_language(split: Split, scenario: str, per: int | None) -> None:
    if split.numbers is not None or scenario != "domain" or per is not None:
        _refuse_language(scenario, per)


def _refuse_language(scenario: str, per: int | None) -> None:
    raise InputError(
        got=f"no column of labels, scenario {scenario!r}, classes_per_experience={per!r}",
        allowed="a column of labels; or a column of texts in scenario domain, for a language model",
        key="stream.columns.label",
    )


def _domains(both: Both) -> list[str]:
    """Names of the domains, the same on both sides."""
    if not both[0].domains:
        raise InputError(
            got="neither a column of domains nor classes to split",
            allowed="stream.columns.domain=COLUMN, or stream.classes_per_experience=2; or, of images, "
            "stream.transform={kind: rotated}, a way for each experience",
            key="stream.columns.domain",
        )
    train, test = (sorted(set(split.domains)) for split in both)
    if train != test:
        odd = sorted(set(train) ^ set(test))[0]
        raise InputError(
            got=f"domain {odd!r} on one side of {both[0].what} only",
            allowed="training and test rows of every domain",
            key="stream.columns.domain",
        )
    return train


def _language(both: Both, reading: Reading, arrange_names: Arrange, held_out: Options) -> Stream:
    """Texts of a domain one after the other, in windows."""
    named = bool(both[0].domains)
    domains = sorted({*both[0].domains, *both[1].domains}) if named else ["all"]
    texts = {
        name: [
            [text for row, text in enumerate(split.texts) if not named or split.domains[row] == name]
            for split in both
        ]
        for name in domains
    }
    arriving = arrange_names(domains)
    tokens = tokenizer_of(reading.vocab_size, texts[arriving[0]][0])
    experiences = []
    for index, name in enumerate(arriving):
        sides = [encoded_rows(rows, tokens) for rows in texts[name]]
        if min(map(len, sides)) < 2:
            raise InputError(
                got=f"{min(map(len, sides))} tokens of {name!r} on one side of {both[0].what}",
                allowed="at least 2 to learn from and 2 to test on: one and the next",
                key="stream.source.path",
            )
        train, test = (windows(side, reading.context) for side in sides)
        experiences.append(Experience(index, name, train, test))
    return Stream(
        name="hf",
        kind="language",
        scenario="domain",
        experiences=tuple(experiences),
        num_classes=tokens.num_tokens,
        input_shape=(reading.context,),
        vocabulary=tokens.vocabulary,
        held_out=held_out_texts(held_out, tokens, reading.context),
    )


def _labelled(
    both: Both,
    classes: tuple[str, ...],
    tokens: Bytes | BytePairs,
    reading: Reading,
    domains: Sequence[str] = (),
) -> Labelled:
    number = {name: place for place, name in enumerate(classes)}
    sides, places = [], []
    for split in both:
        inputs = split.numbers
        if inputs is None:
            text = split.texts, tokens, reading.context, reading.truncate, split.what, split.places
            inputs = padded(*text)
        sides.append(TensorDataset(inputs, torch.tensor([number[name] for name in split.labels])))
        places.append(torch.tensor([domains.index(name) for name in split.domains]) if domains else None)
    if sides[0].tensors[0].shape[1:] != sides[1].tensors[0].shape[1:]:
        raise InputError(
            got=f"training and test images of other sizes in {both[0].what}",
            allowed="one size",
            key="stream.columns.input",
        )
    return Labelled(sides[0], sides[1], classes, tuple(domains), places[0], places[1])
