"""Dealing a stream's training examples out anew: which rows of which experience arrive when.

A plan lists the experiences to come, each as pairs (experience, rows). Where every row stands in a plan
once, no example is lost or doubled.

Legend: T experiences of the stream, P parts to come, n rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from cl_moe.errors import InputError
from cl_moe.seeds import generator
from cl_moe.stream import Experience, Stream, concatenate, take

Part = list[tuple[int, Tensor]]
Weight = Callable[[float], float]


def deal(stream: Stream, plan: Sequence[Part], names: Sequence[str]) -> Stream:
    """The stream whose experiences hold what a plan gives them.

    Each is tested on the test data of the experience that most of its training examples come from, as the
    same object, so that an evaluator scores it once. Its classes are that experience's, then those that come
    from others; a task label does not survive.

    Raises:
        InputError: a part without an example.
    """
    experiences = []
    for index, (part, name) in enumerate(zip(plan, names, strict=True)):
        pieces = [(source, rows) for source, rows in part if len(rows)]
        if not pieces:
            raise InputError(
                got=f"no example for experience {index} ({name})",
                allowed="fewer or larger parts: every experience needs an example",
                key="stream.shape (or stream.cut)",
            )
        main = stream[max(pieces, key=lambda piece: len(piece[1]))[0]]
        train = concatenate([take(stream[source].train, rows) for source, rows in pieces])
        classes = dict.fromkeys(main.classes)
        for source, rows in pieces:
            if stream[source] is not main and stream.kind == "classification":
                present = set(stream[source].train.tensors[1][rows].tolist())
                classes.update(dict.fromkeys(c for c in stream[source].classes if c in present))
        experiences.append(Experience(index, name, train, main.test, tuple(classes)))
    return replace(stream, experiences=tuple(experiences))


def shuffled(experience: Experience, seed: int, purpose: str) -> Tensor:
    """(n,) int64: the rows of an experience's training data, in a drawn order."""
    return torch.randperm(len(experience.train), generator=generator(seed, experience.index, purpose))


def recurring(stream: Stream, visits: int, seed: int) -> Stream:
    """The whole sequence ``visits`` times over, each time with other examples of every experience."""
    rows = [_sorted(shuffled(e, seed, "recurring").tensor_split(visits)) for e in stream]
    plan = [[(e.index, rows[e.index][visit])] for visit in range(visits) for e in stream]
    again = [f"{e.name} (visit {visit + 1})" for visit in range(visits) for e in stream]
    dealt = deal(stream, plan, again)
    labels = [e.task_label for e in stream] * visits
    kept = (replace(e, task_label=label) for e, label in zip(dealt, labels, strict=True))
    return replace(dealt, experiences=tuple(kept))


def blurry(stream: Stream, share: float, seed: int) -> Stream:
    """Lend ``share`` of every experience's examples to the other experiences, evenly.

    Blurry task boundaries (Bang et al. 2021, section 3; "blurry M" is a share of M / 100): the same classes
    are the many of one experience and the few of all others.
    """
    plan: list[Part] = [[] for _ in stream]
    for experience in stream:
        order = shuffled(experience, seed, "blurry")
        lent = round(share * len(order)) if len(stream) > 1 else 0
        plan[experience.index].insert(0, (experience.index, order[lent:].sort().values))
        others = [index for index in range(len(stream)) if index != experience.index]
        for index, rows in zip(others, order[:lent].tensor_split(max(1, len(others))), strict=False):
            plan[index].append((experience.index, rows.sort().values))
    ordered = [sorted(part, key=lambda piece: piece[0] != index) for index, part in enumerate(plan)]
    return deal(stream, ordered, [experience.name for experience in stream])


def drifting(stream: Stream, parts: int, weight: Weight, seed: int) -> Stream:
    """``parts`` short experiences between which one distribution turns into the next.

    At the time t in [0, T - 1], even over the parts, experience k has the weight
    weight(t - k + 1) - weight(t - k), where ``weight`` rises from 0 to 1 on [0, 1]. Every experience's
    examples are dealt out in proportion to its weights over all parts (largest remainders), each once.
    """
    if parts < len(stream):
        raise InputError(
            got=f"parts={parts} for a drift over {len(stream)} experiences",
            allowed=f"at least {len(stream)}, or some would never arrive",
            key="stream.shape.parts",
        )
    last = len(stream) - 1
    times = [last * part / (parts - 1) for part in range(parts)]
    plan: list[Part] = [[] for _ in range(parts)]
    for experience in stream:
        shifts = [time - experience.index for time in times]
        weights = [weight(_unit(shift + 1)) - weight(_unit(shift)) for shift in shifts]
        order = shuffled(experience, seed, "drifting")
        counts = shares(weights, len(order))
        for part, rows in zip(plan, order.split(counts), strict=True):
            part.append((experience.index, rows.sort().values))
    return deal(stream, plan, [f"drift {part + 1}/{parts}" for part in range(parts)])


def unbounded(stream: Stream, parts: int, seed: int) -> Stream:
    """All examples in order of arrival, cut into ``parts`` short experiences that know no boundary."""
    whole: list[tuple[int, int]] = []
    for experience in stream:
        whole += [(experience.index, row) for row in shuffled(experience, seed, "unbounded").tolist()]
    plan: list[Part] = []
    for part in torch.arange(len(whole)).tensor_split(parts):
        rows: dict[int, list[int]] = {}
        for place in part.tolist():
            rows.setdefault(whole[place][0], []).append(whole[place][1])
        plan.append([(source, torch.tensor(sorted(found))) for source, found in rows.items()])
    return deal(stream, plan, [f"part {part + 1}/{parts}" for part in range(parts)])


def shares(weights: Sequence[float], total: int) -> list[int]:
    """``total`` split into whole numbers in proportion to weights, by the largest remainder.

    >>> shares([1.0, 1.0, 2.0], 9)
    [2, 2, 5]
    """
    exact = [weight / sum(weights) * total for weight in weights]
    counts = [int(number) for number in exact]
    by_remainder = sorted(range(len(exact)), key=lambda place: counts[place] - exact[place])
    for place in by_remainder[: total - sum(counts)]:
        counts[place] += 1
    return counts


def _unit(value: float) -> float:
    return min(1.0, max(0.0, value))


def _sorted(rows: Sequence[Tensor]) -> list[Tensor]:
    return [part.sort().values for part in rows]
