"""Split texts: which text does a window come from? The texts arrive in groups, as classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from cl_moe.stream import Experience, Stream
from tasks.arrange import arrange, finish, whole
from tasks.labelled import group_size, known_scenario
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
    shape: Mapping[str, object] | None = None,
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
        shape: the shape of time; see ``tasks.shapes.Shape``.
        data_seed: draws what ``cut`` and ``shape`` draw.
        column: the column that holds the text.

    Raises:
        InputError: a value that is not allowed, a text without a file, too few windows in it.
    """
    setting = known_scenario(scenario)
    known = known_domains(domains)
    size = group_size(classes_per_experience, len(known), scenario, "texts")
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
        scenario=setting,
        experiences=tuple(experiences),
        num_classes=size if scenario == "domain" else len(known),
        input_shape=(context,),
    )
    return finish(whole_stream, tune_on_first, cut, data_seed, shape)


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
