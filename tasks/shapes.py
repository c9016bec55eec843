"""Shapes of time: what a stream's training data looks like as it arrives, whatever it is made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from cl_moe.errors import InputError
from cl_moe.seeds import generator
from cl_moe.stream import Experience, Stream, take
from tasks.dealing import blurry, drifting, recurring, shuffled, unbounded

DRIFTS = ("linear", "sigmoid")
_STEEPNESS = 10.0
"""Of the sigmoid: below .01 and above .99 at the ends of a change, before it is stretched to 0 and 1."""


@dataclass(frozen=True)
class Shape:
    """What is done to a stream's training data, in the order of the parameters; test data stay whole.

    Every example arrives once, but for ``validation`` and ``imbalance``, which set examples aside.

    Args:
        validation: share of each experience's (and class's) training examples that takes the place of its
            test data, below 1; 0 for none. For choosing hyperparameters: the test data are not looked at.
        imbalance: training examples of the rarest class per example of the most frequent one, in (0, 1]. Of
            class c of C (in order of arrival) the share imbalance^(c / (C - 1)) is kept, at least one
            example: the long tail of Cui et al. 2019 (1901.05555, section 5.1), which gives its inverse.
        label_noise: share of each experience's training examples that get another of its labels, drawn evenly
            (symmetric noise); below 1.
        blurry: share of each experience's training examples that arrives in the others, evenly; below 1.
        recurring: how often the sequence of experiences comes, each time with other examples.
        drift: ``linear`` or ``sigmoid``: each distribution turns into the next one by degrees. Needs
            ``parts``.
        parts: short experiences of the whole stream. Without ``drift``, the stream in its order is cut
            evenly, so that its boundaries (which nobody names any more) may lie inside an experience.
        online: each example is seen once: a run with more than one epoch is refused.

    Raises:
        InputError: a value that is not allowed.
    """

    validation: float = 0.0
    imbalance: float = 1.0
    label_noise: float = 0.0
    blurry: float = 0.0
    recurring: int = 1
    drift: str | None = None
    parts: int | None = None
    online: bool = False

    def __post_init__(self) -> None:
        for name in ("validation", "label_noise", "blurry"):
            _number(getattr(self, name), name, "in [0, 1)", lambda share: 0 <= share < 1)
        _number(self.imbalance, "imbalance", "in (0, 1]", lambda share: 0 < share <= 1)
        _whole(self.recurring, "recurring", 1)
        if self.drift is not None and self.drift not in DRIFTS:
            raise _wrong("drift", self.drift, f"{', '.join(DRIFTS)}, or null")
        if self.parts is not None:
            _whole(self.parts, "parts", 2)
        if self.drift is not None and self.parts is None:
            raise _wrong("parts", None, "how many short experiences a drift has, at least 2")
        if not isinstance(self.online, bool):
            raise _wrong("online", self.online, "true or false")

    @classmethod
    def of(cls, options: Mapping[str, object] | None) -> Shape:
        """From a configuration's mapping; None for clear boundaries and balanced, clean data.

        Raises:
            InputError: an unknown key, or a value that is not allowed.
        """
        options = {} if options is None else options
        known = [field.name for field in fields(cls)]
        if not isinstance(options, Mapping):
            raise InputError(got=f"{options!r}", allowed="{key: value, ...} or null", key="stream.shape")
        for key in options:
            if key not in known:
                raise InputError(
                    got=f"stream.shape.{key}", allowed=", ".join(known), key=f"stream.shape.{key}"
                )
        return cls(**{str(key): value for key, value in options.items()})  # type: ignore[arg-type]

    def __call__(self, stream: Stream, seed: int) -> Stream:
        """The stream in this shape; drawn by ``seed``.

        Raises:
            InputError: it does not fit the stream.
        """
        self._check(stream)
        if self.validation:
            stream = validated(stream, self.validation, seed)
        if self.imbalance < 1:
            stream = imbalanced(stream, self.imbalance, seed)
        if self.label_noise:
            stream = noisy(stream, self.label_noise, seed)
        if self.blurry:
            stream = blurry(stream, self.blurry, seed)
        if self.recurring > 1:
            stream = recurring(stream, self.recurring, seed)
        if self.parts is not None:
            stream = self._in_parts(stream, self.parts, seed)
        return replace(stream, online=True) if self.online else stream

    def _in_parts(self, stream: Stream, parts: int, seed: int) -> Stream:
        if self.drift is None:
            return unbounded(stream, parts, seed)
        return drifting(stream, parts, sigmoid if self.drift == "sigmoid" else linear, seed)

    def _check(self, stream: Stream) -> None:
        if stream.kind != "classification" and (self.imbalance < 1 or self.label_noise):
            raise InputError(
                got=f"imbalance={self.imbalance}, label_noise={self.label_noise} on a {stream.kind} stream",
                allowed="a stream with classes",
                key="stream.shape",
            )
        if stream.scenario == "task" and (self.blurry or self.parts is not None):
            raise InputError(
                got="examples of several tasks in one experience of a task-incremental stream",
                allowed="scenario class or domain: no task label would be right",
                key="stream.shape (or stream.scenario)",
            )
        if self.drift is not None and len(stream) * self.recurring < 2:
            raise _wrong("drift", self.drift, "a stream of at least two experiences")


def linear(value: float) -> float:
    """An even step from 0 at 0 to 1 at 1."""
    return value


def sigmoid(value: float) -> float:
    """A smooth step from exactly 0 at 0 to exactly 1 at 1.

    >>> sigmoid(0.0), sigmoid(0.5), sigmoid(1.0)
    (0.0, 0.5, 1.0)
    """
    low = 1 / (1 + math.exp(_STEEPNESS / 2))
    return (1 / (1 + math.exp(-_STEEPNESS * (value - 0.5))) - low) / (1 - 2 * low)


def validated(stream: Stream, share: float, seed: int) -> Stream:
    """Every experience tested on held-out training examples, the same share of each of its classes."""
    experiences = []
    for experience in stream:
        held = _held_out(stream, experience, share, seed)
        kept = torch.ones(len(experience.train), dtype=torch.bool)
        kept[held] = False
        experiences.append(
            replace(
                experience,
                train=take(experience.train, kept.nonzero().squeeze(1)),
                test=take(experience.train, held),
            )
        )
    return replace(stream, experiences=tuple(experiences))


def _held_out(stream: Stream, experience: Experience, share: float, seed: int) -> Tensor:
    order = shuffled(experience, seed, "validation")
    if stream.kind != "classification":
        groups = [order]
    else:
        labels = experience.train.tensors[1][order]
        groups = [order[labels == label] for label in labels.unique()]
    counts = [round(share * len(rows)) for rows in groups]
    short = [len(rows) for rows, count in zip(groups, counts, strict=True) if not 0 < count < len(rows)]
    if short:
        raise _wrong("validation", share, f"a share that leaves examples on both sides of {short[0]}")
    return torch.cat([rows[:count] for rows, count in zip(groups, counts, strict=True)]).sort().values


def imbalanced(stream: Stream, ratio: float, seed: int) -> Stream:
    """Fewer examples of the classes that come later: class c of C keeps the share ratio^(c / (C - 1))."""
    classes = [label for group in stream.class_groups for label in group]
    steps = max(1, len(classes) - 1)
    kept_of = {label: ratio ** (place / steps) for place, label in enumerate(classes)}
    experiences = []
    for experience in stream:
        order = shuffled(experience, seed, "imbalance")
        labels = experience.train.tensors[1][order]
        rows = [order[labels == label] for label in labels.unique().tolist()]
        wanted = [kept_of[label] for label in labels.unique().tolist()]
        kept = [found[: max(1, round(part * len(found)))] for found, part in zip(rows, wanted, strict=True)]
        experiences.append(replace(experience, train=take(experience.train, torch.cat(kept).sort().values)))
    return replace(stream, experiences=tuple(experiences))


def noisy(stream: Stream, share: float, seed: int) -> Stream:
    """Wrong labels for a share of each experience's training examples, evenly of its other classes."""
    experiences = []
    for experience in stream:
        inputs, targets = experience.train.tensors
        classes = torch.tensor(experience.classes)
        count = round(share * len(targets))
        if len(classes) < 2 and count:
            raise _wrong("label_noise", share, "experiences of at least two classes")
        rows = shuffled(experience, seed, "label noise")[:count]
        place_of = {label: place for place, label in enumerate(experience.classes)}
        places = torch.tensor([place_of[label] for label in targets[rows].tolist()], dtype=torch.int64)
        drawn = generator(seed, experience.index, "wrong labels")
        shift = torch.randint(1, max(2, len(classes)), (count,), generator=drawn)
        wrong = targets.clone()
        wrong[rows] = classes[(places + shift) % len(classes)]
        experiences.append(replace(experience, train=TensorDataset(inputs, wrong)))
    return replace(stream, experiences=tuple(experiences))


def _number(value: object, name: str, allowed: str, right: Callable[[float], bool]) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not right(value):  # type: ignore[arg-type]
        raise _wrong(name, value, f"a number {allowed}")


def _whole(value: object, name: str, low: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise _wrong(name, value, f"a whole number of at least {low}")


def _wrong(name: str, value: object, allowed: str) -> InputError:
    return InputError(got=f"{name}={value!r}", allowed=allowed, key=f"stream.shape.{name}")
