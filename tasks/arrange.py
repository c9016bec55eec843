"""What every builder does alike: the order of a stream, its first experiences, cutting, checked numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch.utils.data import TensorDataset

from cl_moe.errors import InputError
from cl_moe.seeds import generator
from cl_moe.stream import Stream, Streamed, cut
from tasks.shapes import Shape

T = TypeVar("T")


def whole(value: object, key: str, low: int | None = None, high: int | None = None, what: str = "") -> int:
    """``value`` if it is a whole number in ``low .. high`` (None: no bound).

    Raises:
        InputError: it is not; ``what`` says in the message what bounds it.

    >>> whole(3, "stream.cut", 1, 4)
    3
    """
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if is_whole and (low is None or value >= low) and (high is None or value <= high):  # type: ignore[operator]
        return value  # type: ignore[return-value]
    bounds = f"{'' if low is None else low} .. {'' if high is None else high}".strip()
    allowed = "a whole number" if low is None and high is None else f"a whole number in {bounds}"
    raise InputError(got=f"{value!r}", allowed=f"{allowed}, {what}" if what else allowed, key=key)


def arrange(items: Sequence[T], order: Sequence[T] | None, seed: int | None) -> list[T]:
    """``items`` in the order in which they arrive.

    Args:
        items: what exists, in natural order, all different.
        order: an explicit order, a permutation of ``items``; None for none.
        seed: draws a permutation; None for none. With neither, the natural order.

    Raises:
        InputError: both given, or ``order`` is no permutation of ``items``.

    >>> arrange(["a", "b", "c"], order=["c", "a", "b"], seed=None)
    ['c', 'a', 'b']
    """
    known = list(items)
    if order is not None and seed is not None:
        raise InputError(
            got=f"order {_shown(order)} and seed {seed!r}",
            allowed="one of them: an explicit order, or a seed that draws one",
            key="stream.order or seed.order",
        )
    if seed is not None:
        drawn = torch.randperm(len(known), generator=generator(whole(seed, "seed.order"), "order"))
        return [known[position] for position in drawn.tolist()]
    if order is None:
        return known
    is_list = isinstance(order, Sequence) and not isinstance(order, str | bytes)
    chosen = list(order) if is_list else []
    if len(chosen) != len(known) or any(chosen.count(item) != 1 for item in known):
        raise InputError(
            got=f"order {_shown(order)}", allowed=f"null, or a permutation of {known}", key="stream.order"
        )
    return [known[known.index(item)] for item in chosen]


def finish(
    stream: Stream,
    tune_on_first: int | None,
    parts: int,
    data_seed: int,
    shape: Mapping[str, object] | None = None,
) -> Stream:
    """The stream as it is used: in its shape, of that its first experiences only, each cut into parts.

    Args:
        stream: the whole stream. ``num_classes`` stays that of the whole.
        tune_on_first: how many experiences to keep, counted before cutting; None keeps all.
        parts: how many shorter experiences each becomes; 1 leaves them whole.
        data_seed: deals the training examples out to the parts, and draws what the shape draws.
        shape: see ``tasks.shapes.Shape``; None for clear boundaries and the data as they are.

    Raises:
        InputError: a number out of range.
    """
    check_filled(stream)
    stream = Shape.of(shape)(stream, whole(data_seed, "seed.data"))
    if tune_on_first is not None:
        kept = whole(tune_on_first, "stream.tune_on_first", 1, len(stream), "the experiences of the stream")
        stream = replace(stream, experiences=stream[:kept])
    return cut(stream, whole(parts, "stream.cut", 1), data_seed)


def check_filled(stream: Stream) -> None:
    """Refuse an experience with nothing to learn or nothing to test, or with classes on one side only.

    Raises:
        InputError: the experience, and what it lacks.
    """
    for experience in stream:
        sides = {"training": experience.train, "test": experience.test}
        for side, data in sides.items():
            if not len(data):
                raise InputError(
                    got=f"no {side} data in experience {experience.index} ({experience.name})",
                    allowed="data of both kinds in every experience",
                    key="stream",
                )
        if stream.kind != "classification":
            continue
        found = {side: _classes(data) for side, data in sides.items()}
        for side, other in (("training", "test"), ("test", "training")):
            if missing := found[other] - found[side]:
                raise InputError(
                    got=f"classes {sorted(missing)} of {experience.name} without {side} examples",
                    allowed=f"every class of the {other} data in the {side} data of its experience, too",
                    key="stream",
                )


def _classes(data: TensorDataset) -> set[int]:
    """That occur; of data that are streamed, those that were counted."""
    if isinstance(data, Streamed):
        return set(data.summary["train_classes"])
    return set(data.tensors[1].unique().tolist())


def _shown(order: object) -> str:
    return str(list(order)) if isinstance(order, Sequence) and not isinstance(order, str) else repr(order)
