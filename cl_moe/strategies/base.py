"""The hooks of a strategy, and what it sees of a step.

Order within an experience: ``begin``, after the model was adapted; for each step ``batch``, ``loss``,
``gradients``; ``end``, before the evaluation. A strategy overrides what it needs. ``view`` is asked once,
before the run, and ``check`` before that; ``predict`` by evaluations.

A run may be killed between any two steps and go on in another process: there ``begin`` is called again,
then ``load_state_dict`` with what ``state_dict`` gave between the two steps. So what ``begin`` makes and
steps change belongs into the state; what ``begin`` makes and steps only read does not.

Among ranks each has every strategy, and what it keeps is the same. Only ``loss`` sees a rank's own rows:
its terms are means over them, or the same on all ranks. What is kept of them is gathered (``agreement``).
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from cl_moe.layers.routing import Routing
from cl_moe.layers.tables import dense_gradients
from cl_moe.models.base import ContinualModel
from cl_moe.stream import Experience, Kind, Stream

Batch = tuple[Tensor, Tensor]
Answer = tuple[Tensor, dict[int, Routing]]
"""Logits, and routings by block."""
Forward = Callable[[Sequence[int] | None], Answer]
"""A pass of an evaluation's model over one batch, with these cohorts of every expert layer; None: all."""


class Question(Protocol):
    """What the scenario asks of logits (law 7): the same for a strategy's own passes as for training."""

    def task_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy, nats per example or real token; of numbers, the mean squared error."""
        ...

    def own_task(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Logits with other tasks' columns at -inf where the scenario gives the task away; else unchanged."""
        ...


@dataclass(frozen=True)
class Setting:
    """What a run is made of, for strategies that cannot serve every one.

    Args:
        model: fresh.
        stream: as evaluated.
        names: of all strategies of the run.
    """

    model: ContinualModel
    stream: Stream
    names: tuple[str, ...]


@dataclass(frozen=True)
class Outlook:
    """What a strategy knows at the start of an experience.

    Args:
        model: the model as it will learn: grown and frozen already.
        experience: the experience to come, training data as the strategies' views left it.
        kind: classification, language or regression.
        seed: the data seed; draw from (seed, experience, purpose).
        group_of_class: (classes,) int64 for the task-incremental scenario: the task of each class; None
            otherwise.
        question: for passes of the strategy's own; a run always has one.
        accumulate: batches per optimizer step; each batch's loss is divided by it.
        forget: lets the optimizer forget a part of a parameter (an index into it) that was drawn anew.
    """

    model: ContinualModel
    experience: Experience
    kind: Kind
    seed: int
    group_of_class: Tensor | None = None
    question: Question | None = None
    accumulate: int = 1
    forget: Callable[[Tensor, Any], None] = lambda parameter, part: None


@dataclass
class Step:
    """One training step as a strategy's ``loss`` sees it.

    Args:
        model: as in ``Outlook``.
        inputs: the batch's inputs, replayed ones included.
        targets: class ids (B,), next tokens (B, S) with ``IGNORE`` on padding, or numbers (B, ...).
        mask: (B, S) bool for language, False on padding; else None.
        logits: (B, C) or (B, S, V), before the scenario masks anything; of numbers, in the targets' shape.
        routings: by block index.
        task_loss: scalar, as it stands in the loss.
        num_new: rows of the stream, which come first; None: all.
        all_new: the same, of all ranks of a distributed run; None: as ``num_new``.
    """

    model: ContinualModel
    inputs: Tensor
    targets: Tensor
    mask: Tensor | None
    logits: Tensor
    routings: dict[int, Routing]
    task_loss: Tensor | None = None
    num_new: int | None = None
    all_new: int | None = None


class Strategy(ABC):  # noqa: B024 (every hook has a sensible default: do nothing)
    """Resists forgetting through any of its hooks; by default through none.

    Attributes:
        computes: whether ``begin`` or ``end`` do more than bookkeeping (they run the model, say): what they
            take is counted then, which is slow where there is nothing to count.
        takes_rows: whether ``gradients`` can work on a table's gradient of rows (``layers/tables.py``); else
            it is given a dense one.
        cost_varies: whether ``loss`` may take more or less operations for batches of the same shapes, in one
            experience and with a model that does not: some of its steps are counted anew then (``Charges``).
        reads_batches: whether it sees training data in batches (or chunks) only, never all rows at once, so
            that they may be streamed.
        needs_past: whether it acts from the second experience on only, by what earlier ones left; beside
            joint training, which has one, it would do nothing.
        stops_learning: whether ``gradients`` takes gradients away, so that something stands still. It runs
            behind those of all others then, whatever the order of the list.
        replaces_task_loss: whether its terms stand in the task loss's place, which two cannot.
    """

    computes: bool = True
    reads_batches: bool = False
    takes_rows: bool = False
    cost_varies: bool = True
    needs_past: bool = False
    stops_learning: bool = False
    replaces_task_loss: bool = False

    def check(self, setting: Setting) -> None:
        """Refuse, before anything is trained, a run that this strategy cannot serve.

        Raises:
            InputError: names the strategy and what it does not go with.
        """
        return None

    def view(self, stream: Stream) -> Stream:
        """The stream as training shall see it (joint training sees all at once); evaluation is untouched."""
        return stream

    def begin(self, outlook: Outlook) -> None:
        """An experience is about to be trained."""
        return None

    def batch(self, inputs: Tensor, targets: Tensor) -> Batch:
        """The batch to train on: the new examples first, as they came; what is added stands behind them."""
        return inputs, targets

    def loss(self, step: Step) -> dict[str, Tensor]:
        """Named terms to be added to the loss, scalars."""
        return {}

    def gradients(self, model: ContinualModel) -> None:
        """Gradients stand, the optimizer has not stepped yet."""
        return None

    def work_on_gradients(self, model: ContinualModel) -> None:
        """``gradients``, of which tables' are dense unless it takes those of rows."""
        if not self.takes_rows:
            dense_gradients(model.parameters())
        self.gradients(model)

    def rate(self, step: int, num_steps: int) -> float:
        """Factor, > 0, on the optimizer's learning rate; those of several strategies multiply.

        Args:
            step: optimizer steps made in this experience.
            num_steps: to be made in it.
        """
        return 1.0

    def end(self, outlook: Outlook) -> None:
        """The experience was trained."""
        return None

    def predict(self, model: ContinualModel, features: Tensor, logits: Tensor) -> Tensor:
        """The scores (B, C) that an evaluation ranks classes by, finite; at most one strategy has its own.

        Args:
            model: being evaluated.
            features: (B, D), what the head read.
            logits: (B, C), what it answered: classes known now, or then where the router is rolled back.
        """
        return logits

    def answer(self, forward: Forward, inputs: Tensor, task: Tensor | None) -> Answer:
        """What an evaluation takes for the model's answer; at most one strategy has its own.

        Args:
            forward: runs the model on the batch.
            inputs: (B, ...), of the batch.
            task: (B,) int64, the number of each example's task, where the scenario gives it away; else None.
        """
        return forward(None)

    def state_dict(self) -> dict[str, Any]:
        """What must survive a restart: tensors and plain Python only."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""
        return None

    def costs(self, model: ContinualModel) -> dict[str, float]:
        """Further ``cost/*`` metrics."""
        return {}

    @property
    def buffer_bytes(self) -> int:
        """Bytes kept for this strategy beside the model: memory, stored copies."""
        return 0


class Hooks(NamedTuple):
    """The strategies of a run that have each of the hooks that a step calls, in the order of the list."""

    batch: tuple[Strategy, ...]
    loss: tuple[Strategy, ...]
    gradients: tuple[Strategy, ...]
    rate: tuple[Strategy, ...]

    @classmethod
    def of(cls, strategies: Mapping[str, Strategy]) -> Hooks:
        """Only hooks that do something are called in every step."""

        def having(hook: str) -> tuple[Strategy, ...]:
            ordered = sorted(strategies.values(), key=lambda s: hook == "gradients" and s.stops_learning)
            return tuple(s for s in ordered if getattr(type(s), hook) is not getattr(Strategy, hook))

        return cls(*(having(hook) for hook in cls._fields))


def tensor_bytes(*tensors: Tensor) -> int:
    """Bytes that tensors hold."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
