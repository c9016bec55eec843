"""Passes of a strategy's own through the model: what an example's answer is, its features, its gradients.

Legend: B batch, S positions, C columns of logits, D width of the features, n examples.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cl_moe.batches import is_asked, padding_mask
from cl_moe.layers.routing import Routing
from cl_moe.layers.tables import dense
from cl_moe.models.base import ContinualModel
from cl_moe.strategies.base import Batch, Outlook, Question, Strategy

Score = Callable[[Tensor, Tensor], Tensor]
"""Of logits and targets of a batch: a scalar."""


class Answer(NamedTuple):
    """What a model was shown, what it was asked for, what it answered, and what its layers routed.

    Args:
        inputs: (B, ...).
        targets: (B,), or (B, S) with ``IGNORE`` where nothing is asked; numbers in any shape.
        logits: (B, C) or (B, S, C); of numbers, in the targets' shape.
        routings: by block.
    """

    inputs: Tensor
    targets: Tensor
    logits: Tensor
    routings: dict[int, Routing]


def learning(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that learn, by name; frozen ones are left out."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def question_of(outlook: Outlook) -> Question:
    """What the scenario asks."""
    if outlook.question is None:
        raise ValueError("an outlook without a question: nothing says what is asked of the logits")
    return outlook.question


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """The model as in an evaluation: nothing drawn, no statistic moved; every part as before afterwards."""
    training = [part for part in model.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


def to_model(model: nn.Module, inputs: Tensor) -> Tensor:
    """Inputs where the model computes; numbers (not token ids) in the precision of its weights."""
    like = next(model.parameters())
    return inputs.to(like) if inputs.is_floating_point() else inputs.to(like.device)


def ask(outlook: Outlook, inputs: Tensor, targets: Tensor, draw: Callable[[], torch.Generator]) -> Answer:
    """Put kept or training examples to the model, as the stream has them.

    Args:
        outlook: whose model is asked.
        inputs: as the stream has them.
        targets: theirs.
        draw: for a model that draws what it is shown.
    """
    model = outlook.model
    inputs = to_model(model, inputs)
    inputs, targets = model.pose(inputs, targets.to(inputs.device), draw)
    mask = padding_mask(targets) if outlook.kind == "language" else None
    return Answer(inputs, targets, *model(inputs, mask=mask))


def loss_of(
    outlook: Outlook, inputs: Tensor, targets: Tensor, draw: Callable[[], torch.Generator]
) -> Tensor | None:
    """The task loss of these examples, a scalar; None where nothing is asked of them (all padding, say)."""
    answer = ask(outlook, inputs, targets, draw)
    if not bool(is_asked(answer.targets).any()):
        return None
    return question_of(outlook).task_loss(answer.logits, answer.targets)


def example_gradients(
    outlook: Outlook, rows: Tensor, draw: torch.Generator, score: Score
) -> Iterator[dict[str, Tensor]]:
    """For every row of the training data the gradient of its own score, by name of what learns.

    One example is one pass: importances of weights need the square or the size of each example's gradient,
    and those of a batch's mean are something else. An example is a row of the data; for language, a sequence.
    Rows of which nothing is asked are passed over. The model answers as in an evaluation.
    """
    inputs, targets = outlook.experience.train.tensors
    parameters = learning(outlook.model)
    held = list(parameters.values())
    with quiet(outlook.model), torch.enable_grad():
        for row in rows.tolist():
            one = slice(row, row + 1)
            answer = ask(outlook, inputs[one], targets[one], lambda: draw)
            if not bool(is_asked(answer.targets).any()):
                continue
            gradients = torch.autograd.grad(score(answer.logits, answer.targets), held, allow_unused=True)
            yield {
                name: torch.zeros_like(p) if gradient is None else dense(gradient)
                for (name, p), gradient in zip(parameters.items(), gradients, strict=True)
            }


def memory_gradient(
    outlook: Outlook, kept: Batch, draw: torch.Generator, names: Container[str] | None = None
) -> dict[str, Tensor]:
    """The gradient of the task loss on kept examples, by name of what learns; empty if nothing is asked.

    The model answers as in an evaluation, so that looking back moves no running statistic.

    Args:
        outlook: whose model looks back.
        kept: inputs and targets.
        draw: for a model that draws what it is shown.
        names: of the parameters that are asked for; None: of all that learn.
    """
    parameters = {n: p for n, p in learning(outlook.model).items() if names is None or n in names}
    if not parameters:
        return {}
    with quiet(outlook.model), torch.enable_grad():
        loss = loss_of(outlook, *kept, lambda: draw)
        if loss is None:
            return {}
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    pairs = zip(parameters, gradients, strict=True)
    return {name: dense(gradient) for name, gradient in pairs if gradient is not None}


@contextmanager
def reading(model: ContinualModel) -> Iterator[list[Tensor]]:
    """Collects what the head reads, (..., D), in passes that run inside."""
    read: list[Tensor] = []
    hook = model.head.register_forward_pre_hook(lambda head, inputs: read.append(inputs[0]))
    try:
        yield read
    finally:
        hook.remove()


@torch.no_grad()
def features_of(model: ContinualModel, inputs: Tensor, batch_size: int = 256) -> Tensor:
    """(n, D) features of inputs (n, ...), as in an evaluation; on the CPU."""
    found = []
    with quiet(model), reading(model) as read:
        for part in inputs.split(batch_size):
            model(to_model(model, part))
            found.append(read.pop().cpu())
    return torch.cat(found)


@contextmanager
def answering(model: ContinualModel, classifier: Strategy | None) -> Iterator[Callable[[Tensor], Tensor]]:
    """Run a pass inside; what it gives turns its logits into the answers that are scored."""
    if classifier is None:
        yield lambda logits: logits
        return
    with reading(model) as read:
        yield lambda logits: classifier.predict(model, read[-1], logits)
