"""Experiences of images under a transformation: each in its own way, or the same ones in every way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor
from torch.utils.data import TensorDataset

from cl_moe.errors import InputError
from cl_moe.stream import Experience, Scenario, Stream
from tasks.arrange import whole
from tasks.transforms import KEY, Transform


def changed(stream: Stream, change: Transform | None, ways: Sequence[int], seed: int) -> Stream:
    """The stream with images of its own, those of experience i seen in way number ``ways[i]``.

    Raises:
        InputError: its inputs are no images, or no way is left for an experience.
    """
    if change is None:
        return stream
    if change.ways is not None and len(change.ways) < len(stream):
        raise InputError(
            got=f"{len(change.ways)} ways to change the images of {len(stream)} experiences",
            allowed="a way for each experience",
            key=KEY,
        )
    pairs = zip(stream, ways, strict=True)
    experiences = tuple(_changed(experience, change, way, seed) for experience, way in pairs)
    shape = tuple(experiences[0].train.tensors[0].shape[1:])
    return replace(stream, experiences=experiences, input_shape=shape)


def ways_of_a_whole(change: Transform | None, scenario: Scenario, count: int | None, allowed: str) -> int:
    """The number of experiences, each with all classes, that a transformation gives.

    Args:
        change: it.
        scenario: has to be ``domain``.
        count: asked for where it lists no ways; None: 5.
        allowed: in place of no transformation.

    Raises:
        InputError: no transformation, another scenario, or a count where the ways are listed.
    """
    if change is None or scenario != "domain":
        raise InputError(
            got=f"all classes in every experience, {'no' if change is None else 'a'} transformation, "
            f"scenario {scenario!r}",
            allowed=allowed,
            key="stream.scenario, stream.transform or stream.classes_per_experience",
        )
    if change.ways is None:
        return 5 if count is None else whole(count, "stream.num_experiences", 1)
    check_no_count(count, "a transformation that lists its ways")
    return len(change.ways)


def check_no_count(count: int | None, beside: str) -> None:
    """Refuse a number of experiences where something else tells it."""
    if count is not None:
        raise InputError(got=f"{count!r} beside {beside}", allowed="null", key="stream.num_experiences")


def _changed(experience: Experience, change: Transform, way: int, seed: int) -> Experience:
    """An experience with tensors of its own."""
    train, test = (
        TensorDataset(_apply(change, data, way, seed, part), data.tensors[1].clone())
        for part, data in (("train", experience.train), ("test", experience.test))
    )
    name = ", ".join(word for word in (experience.name, change.name(way)) if word)
    return replace(experience, name=name, train=train, test=test)


def _apply(change: Transform, data: TensorDataset, way: int, seed: int, part: str) -> Tensor:
    """Images of any shape changed, grey ones given back in it; a flat input is a square."""
    inputs, classes_N = data.tensors
    side = round(inputs[0].numel() ** 0.5)
    images = inputs.view(-1, side, side) if inputs.dim() == 2 and side**2 == inputs.shape[1] else inputs
    if not images.is_floating_point() or not (images.dim() == 3 or images.shape[1:-2] == (3,)):
        raise InputError(
            got=f"a transformation of inputs of shape {tuple(inputs.shape[1:])}",
            allowed="images, grey or in three colours; or stream.transform=null",
            key=KEY,
        )
    seen = change(images, classes_N, way, seed, part)
    return seen if change.in_colour else seen.reshape(inputs.shape)
