"""The contract of a stream: what an experience holds and what a scenario declares.

A stream is a sized sequence of experiences. Each holds its own train and test data as tensors, so a batch is
one ``index_select``. Builders live in ``tasks/``; this file knows no data set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args, overload

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from cl_moe.errors import InputError

Scenario = Literal["task", "domain", "class"]
Kind = Literal["classification", "language", "regression"]
SCENARIOS: tuple[str, ...] = get_args(Scenario)
HEADS = ("growing", "whole")
UNITS: dict[Kind, str] = {
    "classification": "share correct",
    "language": "nats per token",
    "regression": "squared error",
}
"""What scores of each kind are told in."""

IGNORE = -100
"""Target of a padded position: no loss, no routing, no count (torch's own ``ignore_index``)."""
ASKED = 1 << 32
"""Added to the targets of a passage's last word: a whole answer is asked for there, not a token."""


def is_loss(kind: Kind) -> bool:
    """Whether scores are minus a loss, and are shown as losses; else they are shares of right answers."""
    return kind != "classification"


@dataclass(frozen=True)
class Experience:
    """One stretch of a stream.

    Args:
        index: position in the stream, 0 .. T-1; the column of the accuracy matrix.
        name: for people: ``"digits 0-1"``, ``"novels_en"``.
        train: ``(inputs, targets)``. Classification: inputs (n, ...) float, targets (n,) int64 class ids.
            Language: inputs (n, S) int64 tokens, targets (n, S) int64 next tokens, ``IGNORE`` on padding.
            Regression: inputs (n, ...) float, targets (n, ...) float32, every one of them asked for.
        test: the same for held-out data.
        classes: class ids that occur here, in the stream's order; empty for language and regression.
        task_label: only in the task-incremental scenario; None otherwise.
    """

    index: int
    name: str
    train: TensorDataset
    test: TensorDataset
    classes: tuple[int, ...] = ()
    task_label: int | None = None


class Streamed(TensorDataset):
    """Training data that are read while they are learnt: a few blocks in memory, the newest asked for.

    Args:
        num_rows: n, known before anything is read.
        block: rows of each block but the last.
        read: gives the tensors of a block.
        checksum: of all of it.
        summary: what a description says: ``{"train_tokens": n}``, or ``{"train_classes": {class: n}}``.
    """

    def __init__(
        self,
        num_rows: int,
        block: int,
        read: Callable[[int], tuple[Tensor, ...]],
        checksum: int,
        summary: Mapping[str, Any],
    ) -> None:
        self.num_rows, self.block, self.read = num_rows, block, read
        self.checksum, self.summary = checksum, dict(summary)
        self._held: dict[int, tuple[Tensor, ...]] = {}

    @property
    def tensors(self) -> tuple[Tensor, ...]:  # type: ignore[override]
        """Not there.

        Raises:
            InputError: always: whoever asks would hold all of it.
        """
        raise InputError(
            got="all rows at once of data that are streamed",
            allowed="stream.streaming=false; or no cut, no shape but online, a strategy that reads batches",
            key="stream.streaming (or strategy, stream.cut, stream.shape)",
        )

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, rows: Tensor) -> tuple[Tensor, ...]:
        """The rows with these numbers, of as many blocks as they lie in."""
        blocks = (rows // self.block).tolist()
        wanted = sorted(set(blocks))
        self._held = {b: self._held[b] if b in self._held else self.read(b) for b in wanted}
        picked = [self._held[b] for b in blocks]
        places = (rows % self.block).tolist()
        columns = range(len(picked[0]))
        return tuple(
            torch.stack([held[c][place] for held, place in zip(picked, places, strict=True)]) for c in columns
        )


def chunks(data: TensorDataset) -> Iterator[tuple[Tensor, ...]]:
    """All rows, in order: at once, or block by block where they are streamed; nothing of no rows."""
    if isinstance(data, Streamed):
        yield from (data.read(block) for block in range(-(-len(data) // data.block)))
    elif len(data):
        yield data.tensors


@dataclass(frozen=True)
class HeldOut:
    """A text that no experience trains on, for measuring a language model.

    Args:
        name: part of its metrics' keys: ``byte_perplexity/NAME``.
        text: windows of it, as an experience holds them; None for passages alone.
        passages: (n, S) tokens that end with a word, and (n, S) next tokens, ``IGNORE`` on padding, those of
            the word ``ASKED`` higher, and the one behind it twice that; None for none.
    """

    name: str
    text: TensorDataset | None
    passages: TensorDataset | None = None


@dataclass(frozen=True)
class Stream(Sequence[Experience]):
    """A sized, seeded sequence of experiences with one scenario.

    Args:
        name: the stream's name, e.g. ``"split_digits"``.
        kind: what is learned: ``"classification"``, ``"language"`` (the next token) or ``"regression"``.
        scenario: task-, domain- or class-incremental (van de Ven et al. 2022); without classes: domain.
        experiences: numbered 0 .. T-1.
        num_classes: distinct classes over the whole stream, or the vocabulary size; 0 for regression.
        input_shape: shape of one input without the batch; ``(S,)`` for language.
        vocabulary: what each token stands for, by its number; empty where tokens are bytes, or none.
        online: every training example may be seen once only; a run of several epochs is refused.
        held_out: texts for measuring a language model, all different in name.
        open: further experiences may arrive behind the last one, so nothing that is done before them may
            depend on them: a row measures what was learnt by then, and every boundary may be the end.
        head: class-incremental: ``"growing"``, rows of the read-out are born with their classes; ``"whole"``,
            they are there from the start and learn from the start that their classes have not come, as other
            platforms have it. An evaluation looks at classes that have come and no others, either way.
    """

    name: str
    kind: Kind
    scenario: Scenario
    experiences: tuple[Experience, ...] = field(repr=False)
    num_classes: int
    input_shape: tuple[int, ...]
    vocabulary: tuple[bytes, ...] = field(default=(), repr=False)
    online: bool = False
    held_out: tuple[HeldOut, ...] = field(default=(), repr=False)
    open: bool = False
    head: str = "growing"

    def __post_init__(self) -> None:
        if self.head not in HEADS:
            raise InputError(got=f"head {self.head!r}", allowed=", ".join(HEADS), key="stream.head")
        if self.scenario not in SCENARIOS:
            raise InputError(
                got=f"scenario {self.scenario!r}", allowed=", ".join(SCENARIOS), key="stream.scenario"
            )
        if not self.experiences:
            raise InputError(got="a stream of 0 experiences", allowed="at least 1", key="stream")
        for position, experience in enumerate(self.experiences):
            if experience.index != position:
                raise ValueError(f"experience {experience.index} stands at position {position}")

    def __len__(self) -> int:
        return len(self.experiences)

    @overload
    def __getitem__(self, index: int) -> Experience: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Experience, ...]: ...

    def __getitem__(self, index: int | slice) -> Experience | tuple[Experience, ...]:
        return self.experiences[index]

    def __iter__(self) -> Iterator[Experience]:
        return iter(self.experiences)

    @property
    def classes_at_start(self) -> tuple[tuple[int, ...], ...]:
        """Groups of classes whose head rows exist before training: one group per cohort of head rows.

        Class-incremental: none, unless ``head`` says otherwise: the head grows as classes arrive. In the
        other scenarios the labels are no secret of the stream, so the head is whole from the start and the
        row before any training is measured, not assumed. An open stream knows the classes of its tasks no
        sooner than they arrive.
        """
        growing = self.scenario == "class" and self.head == "growing"
        return () if growing or (self.open and self.scenario != "domain") else self.class_groups

    @property
    def class_groups(self) -> tuple[tuple[int, ...], ...]:
        """New classes per experience, in order of first appearance; experiences without new ones left out."""
        seen: set[int] = set()
        groups = []
        for experience in self.experiences:
            new = tuple(label for label in experience.classes if label not in seen)
            seen.update(new)
            if new:
                groups.append(new)
        return tuple(groups)

    @property
    def classes_by_then(self) -> tuple[int, ...]:
        """For each experience, how many classes have rows of the head while it is learnt."""
        seen = {label for group in self.classes_at_start for label in group}
        counts = []
        for experience in self.experiences:
            seen.update(experience.classes)
            counts.append(len(seen))
        return tuple(counts)

    @property
    def horizon(self) -> int:
        """So many experiences a plan may look ahead: all there are, or 100 where more may arrive."""
        return max(100, len(self)) if self.open else len(self)

    def end(self, after: int) -> int:
        """The number of experiences behind which the stream ends, for all that is known ``after`` so many."""
        return after if self.open else len(self)

    def measured(self, after: int) -> tuple[Experience, ...]:
        """What is evaluated ``after`` so many experiences."""
        return self.experiences[: self.end(after)]

    def group_of_class(self) -> Tensor:
        """(classes,) int64: which of ``class_groups`` each class belongs to; -1 if it never arrives."""
        group = torch.full((self.num_classes,), -1)
        for index, classes in enumerate(self.class_groups):
            group[list(classes)] = index
        return group


def cut(stream: Stream, parts: int, seed: int) -> Stream:
    """Cut every experience into ``parts`` shorter ones, so that growth can act inside it.

    The training examples are dealt out at random (by ``seed``) and every one of them stays in the stream
    exactly once; each part keeps the whole test set of the experience that it came from, as the same object,
    so that an evaluator scores it once.

    Raises:
        InputError: ``parts`` below 1, or more parts than an experience has training examples.
    """
    from cl_moe.seeds import generator

    if parts == 1:
        return stream
    smallest = min(len(experience.train) for experience in stream)
    if not 1 <= parts <= smallest:
        raise InputError(
            got=f"cut={parts}",
            allowed=f"1 .. {smallest}, the training examples of the shortest experience",
            key="stream.cut",
        )
    shorter: list[Experience] = []
    for experience in stream:
        order = torch.randperm(len(experience.train), generator=generator(seed, experience.index, "cut"))
        for part, rows in enumerate(order.tensor_split(parts)):
            shorter.append(
                replace(
                    experience,
                    index=len(shorter),
                    name=f"{experience.name} ({part + 1}/{parts})",
                    train=take(experience.train, rows.sort().values),
                )
            )
    return replace(stream, experiences=tuple(shorter))


def take(data: TensorDataset, rows: Tensor) -> TensorDataset:
    """The rows of every tensor of a data set, in the given order."""
    return TensorDataset(*(tensor.index_select(0, rows) for tensor in data.tensors))


def concatenate(parts: Sequence[TensorDataset]) -> TensorDataset:
    """Several data sets as one, in order."""
    columns = zip(*(part.tensors for part in parts), strict=True)
    return TensorDataset(*(torch.cat(column) for column in columns))
