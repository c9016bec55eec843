"""Split texts: which text does a window come from? The texts arrive in groups, as classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from cl_moe.errors import InputError
from cl_moe.stream import SCENARIOS, Experience, Scenario, Stream
from tasks.arrange import arrange, finish, whole
from tasks.text_domains import known_domains, read_domain


def split_texts(
    scenario: str = "class",
    domains: Sequence[str] = (
        "novels_en",
        "python_code",
        "bible_en",
        "brown_press",
        "bible_es",
        "brown_learned",
    ),
    classes_per_experience: int = 2,
    context: int = 64,
    train_windows: int = 400,
    test_windows: int = 100,
    order: Sequence[str] | None = None,
    seed: int | None = None,
    cut: int = 1,
    tune_on_first: int | None = None,
    data_seed: int = 0,
    column: str = "text",
) -> Stream:
    """One class per text, as bytes: inputs (n, context) int64, targets (n,) int64.

    A text is a parquet file as in ``text_domains``. Windows of ``context`` bytes do not overlap and are whole
    (what is left over at the end of a text is in none of them); as many as asked for are taken at even
    distances from the whole text, training ones from its split ``train``, test ones from ``validation``. A
    window may begin or end inside a character.

    Args:
        scenario: ``class``: a label is the place of a text in ``domains``, no task label. ``task``: the same,
            ``task_label`` is the number of the group. ``domain``: a label is a text's place in its group.
        domains: the texts, each once.
        classes_per_experience: a divisor of their number; 1 only with ``class``.
        context: bytes per window, at least 1.
        train_windows: per text, at least 1.
        test_windows: per text, at least 1.
        order: the texts in order of arrival, a permutation of ``domains``.
        seed: draws that order; null and no ``order``: as in ``domains``.
        cut: how many shorter experiences each group is cut into.
        tune_on_first: keep only so many groups, for choosing hyperparameters; ``num_classes`` stays.
        data_seed: deals examples out to the parts of ``cut``.
        column: the column that holds the text.

    Raises:
        InputError: a value that is not allowed, a text without a file, too few windows in it.
    """
    if scenario not in SCENARIOS:
        raise InputError(got=f"{scenario!r}", allowed=", ".join(SCENARIOS), key="stream.scenario")
    known = known_domains(domains)
    size = _group_size(classes_per_experience, len(known), scenario)
    names = arrange(known, order, seed)
    counts = (train_windows, test_windows)
    texts = {name: _windows(name, column, context, counts) for name in names}
    experiences = []
    for index, start in enumerate(range(0, len(names), size)):
        group = names[start : start + size]
        labels = list(range(size)) if scenario == "domain" else [known.index(name) for name in group]
        train, test = (_labelled([texts[name][part] for name in group], labels) for part in (0, 1))
        experiences.append(
            Experience(
                index=index,
                name="-".join(group),
                train=train,
                test=test,
                classes=tuple(labels),
                task_label=index if scenario == "task" else None,
            )
        )
    whole_stream = Stream(
        name="split_texts",
        kind="classification",
        scenario=cast(Scenario, scenario),
        experiences=tuple(experiences),
        num_classes=size if scenario == "domain" else len(known),
        input_shape=(context,),
    )
    return finish(whole_stream, tune_on_first, cut, data_seed)


def _group_size(classes_per_experience: int, num_classes: int, scenario: str) -> int:
    key = "stream.classes_per_experience"
    low = 1 if scenario == "class" else 2
    divisors = [size for size in range(low, num_classes + 1) if num_classes % size == 0]
    size = whole(classes_per_experience, key, what=f"one of {divisors}")
    if size not in divisors:
        raise InputError(
            got=f"{size} classes per experience of {num_classes} texts in scenario {scenario!r}",
            allowed=", ".join(map(str, divisors)) or "nothing: a single text leaves nothing to choose",
            key=key,
        )
    return size


def _windows(name: str, column: str, context: int, counts: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(n, context) windows for training and for testing."""
    length = whole(context, "stream.context", 1)
    parts = []
    for text, count, key in zip(
        read_domain(name, column), counts, ("stream.train_windows", "stream.test_windows"), strict=True
    ):
        there = len(text) // length
        wanted = whole(count, key, 1, there, f"the windows of {length} bytes in {name}")
        bytes_N = torch.frombuffer(bytearray(text[: there * length]), dtype=torch.uint8).to(torch.int64)
        parts.append(bytes_N.view(there, length)[torch.arange(wanted) * there // wanted])
    return parts[0], parts[1]


def _labelled(windows: Sequence[Tensor], labels: Sequence[int]) -> TensorDataset:
    sizes = torch.tensor([len(part) for part in windows])
    return TensorDataset(torch.cat(list(windows)), torch.tensor(labels).repeat_interleave(sizes))
