"""What is refused before any training: settings that a run would fail by, or be worthless by, hours later."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from cl_moe import reading
from cl_moe.cost import CostMeter
from cl_moe.errors import InputError
from cl_moe.growth import Census, FreezePolicy, GrowthSchedule
from cl_moe.layers.routing import ExpertLoad
from cl_moe.learner import Learner
from cl_moe.measuring import Measuring, Past, uneven_layers
from cl_moe.metrics.functional import Choices
from cl_moe.models import ContinualModel
from cl_moe.plasticity import expected_points
from cl_moe.scoring import check_shape
from cl_moe.strategies import Strategy
from cl_moe.strategies.checks import only_one
from cl_moe.strategies.passes import quiet, to_model
from cl_moe.stream import Stream, Streamed, chunks
from cl_moe.tracking import diagnostics, inside, names
from cl_moe.tracking.record import Record

_LATER = ("cost/tokens_per_second", "cost/inference_flops_per_token")
"""Costs that are defined once something was trained and measured."""


_PARTS = {
    "stream": "another stream, or of other data",
    "held_out": "other held-out texts",
    "model": "another model",
}


def training_view(stream: Stream, strategies: Mapping[str, Strategy]) -> Stream:
    """The stream as the strategies let training see it; at most one of them may change it."""
    changing = only_one(strategies, "view", "each decides which data is trained on")
    return changing.view(stream) if changing else stream


def check_fit(stream: Stream, model: ContinualModel, epochs: int, strategies: Mapping[str, Strategy]) -> None:
    """Refuse a model that does not answer what the stream asks, and epochs of which the stream allows one.

    Args:
        stream: as evaluated.
        model: that is to learn it.
        epochs: passes over each experience.
        strategies: by name.
    """
    table, of_numbers = getattr(model, "tokens", None), stream[0].test.tensors[0].is_floating_point()
    if of_numbers == isinstance(table, nn.Embedding) and stream.kind == "classification":
        raise InputError(
            got=f"a model of {'texts' if of_numbers else 'numbers'} on a stream of "
            f"{'images or numbers' if of_numbers else 'texts'}",
            allowed="model=mlp or model=patch_transformer"
            if of_numbers
            else "model=encoder_classifier or model=decoder_classifier",
            key="model (or stream)",
        )
    if (
        stream.vocabulary
        and isinstance(table, nn.Embedding)
        and table.num_embeddings < len(stream.vocabulary)
    ):
        raise InputError(
            got=f"a stream of {len(stream.vocabulary)} tokens for a model of {table.num_embeddings}",
            allowed=f"model.vocabulary={len(stream.vocabulary)}",
            key="model.vocabulary (or stream.tokenizer)",
        )
    if stream.kind == "regression":
        _check_numbers(stream, model)
    if stream.held_out and not reading.reads(model, stream):
        raise InputError(
            got="held-out texts for a model that does not predict the next token",
            allowed="model=decoder or model=hugging_face; or no held-out texts",
            key="stream.held_out (or model)",
        )
    unable = [name for name, strategy in strategies.items() if not strategy.reads_batches]
    if unable and any(isinstance(experience.train, Streamed) for experience in stream):
        raise InputError(
            got=f"strategy={unable[0]}, which goes through an experience's data by itself, on a streamed one",
            allowed="a strategy that reads batches (naive, replay, lwf, lifelong_moe, si, ...), or "
            "stream.streaming=false",
            key="strategy (or stream.streaming)",
        )
    if stream.online and epochs != 1:
        raise InputError(
            got=f"{epochs} passes over each experience of an online stream",
            allowed="1: each example is seen once",
            key="trainer.epochs (or stream.shape.online)",
        )


def _check_numbers(stream: Stream, model: ContinualModel) -> None:
    """Refuse regression with classes, targets that are no finite numbers, or answers of another shape."""
    if stream.scenario != "domain" or stream.num_classes or stream.class_groups:
        raise InputError(
            got=f"{stream.num_classes} classes in scenario {stream.scenario} of a regression stream",
            allowed="scenario domain without classes: targets are numbers",
            key="stream.scenario (or stream)",
        )
    for experience in stream:
        for data in (experience.train, experience.test):
            if not all(t[1].is_floating_point() and t[1].isfinite().all() for t in chunks(data)):
                raise InputError(
                    got=f"targets of {experience.name} (experience {experience.index}) that are not finite",
                    allowed="floating-point numbers, none of them NaN or infinite",
                    key="stream",
                )
    inputs, targets = stream[0].test[:2]
    with quiet(model), torch.no_grad():
        check_shape(model(to_model(model, inputs))[0], targets)


def check_objective(objective: str, stream: Stream, learner: Learner, measuring: Measuring) -> None:
    """Refuse an objective that the end of a run on this stream will not define."""
    num, blocks = len(stream), learner.model.expert_layers.items()
    sizes = {block: sum(layer.cohort_sizes) for block, layer in blocks}
    loads = {
        block: [ExpertLoad(torch.ones(size).double(), torch.ones(size).long(), torch.tensor(size))] * num
        for block, size in sizes.items()
    }
    passed = ExpertLoad(torch.ones(1).double(), torch.ones(1).long(), torch.tensor(1))
    ended = Record(
        stream.kind,
        [experience.name for experience in stream],
        rows=[torch.zeros(num, dtype=torch.float64)] * (num + 1),
        loads=[loads] * (num + 1),
        cohorts=[{block: [(size, 0, False)] for block, size in sizes.items()}] * (num + 1),
        depths=[{block: [passed] * num for block in learner.model.depth_blocks}] * (num + 1),
    )
    tokens = {block: Choices(torch.zeros(1).int(), torch.ones(1).int(), 1) for block in sizes}
    past = dict.fromkeys(range(num), tokens) if measuring.samples else {}
    points = diagnostics.load_metrics(ended, num) | diagnostics.changes([tokens] * num, past, num)
    points |= diagnostics.latencies(dict.fromkeys(sizes, torch.ones(num, 2)), num)
    points |= diagnostics.takers([tokens] if measuring.samples else [], uneven_layers(learner.model))
    points |= inside.calibration_points(ended, num, torch.zeros(num))
    points |= inside.online_points(ended, num, 0.0)
    points |= expected_points(learner.model) if measuring.samples else {}
    points |= reading.expected_points(learner.model, stream)
    if measuring.every is not None:
        for experience in range(num):
            inside.open_anytime(ended, experience)
    ended.points = [*[dict[str, float]()] * num, points]
    if measuring.decomposes(num, num):
        ended.rewound[num] = torch.zeros(num - 1, dtype=torch.float64)
    if measuring.cumulative is not None:
        ended.cumulative = ended.matrix
    names.objective(ended, objective, CostMeter(learner, Past()).points() | dict.fromkeys(_LATER, 1.0))


def check_learning(stream: Stream, training: Stream, growth: GrowthSchedule, freeze: FreezePolicy) -> None:
    """Refuse a policy that leaves nothing to learn where nothing is ever born.

    Args:
        stream: as evaluated.
        training: as trained on.
        growth: when experts are born.
        freeze: what stops learning.
    """
    if growth.sizes and len(stream) > 1 and not any(len(e.train) for e in training[1:]):
        raise InputError(
            got="growth beside a strategy that trains before it only",
            allowed="growth=never beside joint training",
            key="growth (or strategy)",
        )
    arrived = [sum(len(e.train) for e in stream[: here.index + 1]) for here in training]
    if stream.open and any(len(here.train) > num for here, num in zip(training, arrived, strict=True)):
        raise InputError(
            got="a strategy that trains on experiences before their time, on a stream that still arrives",
            allowed="one that trains on what is there (cumulative, replay, ...)",
            key="strategy",
        )
    seen: set[int] = {label for group in stream.classes_at_start for label in group}
    for experience in training:
        newborns = growth.newborns(Census(experience.index, {}))
        stop = freeze.decide(Census(experience.index, {}), newborns)
        born = newborns or {*experience.classes} - seen
        if stop.everything and not born and len(experience.train):
            raise InputError(
                got=f"nothing left to learn in experience {experience.index}",
                allowed="growth, or new classes in every experience, beside freeze=all_past",
                key="freeze (or growth)",
            )
        seen.update(experience.classes)


def check_something_left(training: Stream, boundary: int) -> None:
    """Refuse a branch after which nothing is trained: at the parent's end, or beside joint training."""
    if not any(len(experience.train) for experience in training[boundary:]):
        raise InputError(
            got=f"a branch after {boundary} of {len(training)} experiences, with nothing left to train on",
            allowed="an earlier boundary, and a strategy that trains on what comes after it",
            key="branch (or strategy)",
        )


def fingerprint(stream: Stream, learner: Learner) -> dict[str, object]:
    """What a checkpoint must share with a fresh run that is to load it: plain Python."""
    shapes = {name: list(value.shape) for name, value in learner.model.state_dict().items()}
    sums = lru_cache(maxsize=None)(_checksum)  # experiences may share their test data
    train = [
        [e.train.checksum] if isinstance(e.train, Streamed) else [sums(t) for t in e.train.tensors]
        for e in stream
    ]
    data = [[e.name, *own, *map(sums, e.test.tensors)] for e, own in zip(stream, train, strict=True)]
    texts = [
        [h.name, *(sums(t) for part in (h.text, h.passages) if part for t in part.tensors)]
        for h in stream.held_out
    ]
    return {"stream": [stream.name, *data], "held_out": texts, "model": shapes}


def _longer(then: Sequence[Any], now: Sequence[Any]) -> Sequence[Any]:
    """What the stream is now, if it has all that it was then at its beginning."""
    for index, before in enumerate(then):
        after = now[index] if index < len(now) else None
        if before != after and index:
            got = f"experience {index - 1}, which was {before[0]!r} when it was learnt, and is "
            got += "gone" if after is None else "changed" if before[0] == after[0] else f"{after[0]!r} now"
            raise InputError(
                got=got,
                allowed="the data that the run began with, unchanged, and new data behind them; or a new run",
                key="stream (or output_dir)",
            )
    return now if then[:1] == now[:1] else then


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def why_not(
    state: Mapping[str, Any], fingerprint: Mapping[str, Any], other_model: bool, open_stream: bool = False
) -> str | None:
    """Why a checkpoint's state is none of a run's, if it is not.

    Args:
        state: of the checkpoint.
        fingerprint: of the run.
        other_model: whether it may be of another model, as a dense parent's is that a mixture takes over.
        open_stream: whether the stream may have more experiences by now.

    Raises:
        InputError: one of those that an open stream had before is not what it was; going back to an older
            checkpoint would hide that.
    """
    theirs = dict(state.get("fingerprint", {}))
    if open_stream and theirs.get("stream"):
        theirs["stream"] = _longer(theirs["stream"], fingerprint["stream"])
    known = {"held_out": fingerprint["held_out"], **theirs}  # older checkpoints do not tell these
    for part, what in _PARTS.items():
        if known.get(part) != fingerprint[part] and not (part == "model" and other_model):
            return f"is of {what}"
    return None
