"""Streams of images: an image set, cut by classes, changed by a transformation, or both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor
from torch.utils.data import TensorDataset

from cl_moe.errors import InputError
from cl_moe.stream import Experience, Scenario, Stream
from tasks.arrange import arrange, finish, whole
from tasks.images import images
from tasks.labelled import Labelled, by_classes, group_size, known_scenario
from tasks.transforms import Transform


def image_stream(
    dataset: str = "mnist",
    scenario: str = "class",
    classes_per_experience: int | None = 2,
    transform: Mapping[str, object] | None = None,
    num_experiences: int | None = None,
    order: Sequence[int] | None = None,
    seed: int | None = None,
    cut: int = 1,
    tune_on_first: int | None = None,
    shape: Mapping[str, object] | None = None,
    data_seed: int = 0,
    head: str = "growing",
) -> Stream:
    """Groups of classes of an image set, the whole set under one transformation after the other, or both.

    Args:
        dataset: ``digits``, ``mnist``, ``fashion_mnist`` or ``omniglot``: see ``tasks.images.images``.
        scenario: ``class``: labels are the set's, no task label. ``task``: the same, ``task_label`` is the
            number of the group. ``domain``: a label is the place of a class within its group, or, with all
            classes in every experience, its number (van de Ven et al. 2022).
        classes_per_experience: a divisor of the number of classes; 1 only with ``class``. Null: all classes
            in every experience, which takes a transformation, and ``domain``.
        transform: see ``tasks.transforms.Transform``; beside groups, group i is seen in the i-th way. Null:
            images as they are.
        num_experiences: how many ways a transformation has that does not list them (``permuted``; null: 5);
            null for others, and beside groups.
        order: in order of arrival, a permutation: of the classes' numbers, or of the ways' numbers.
        seed: draws that order; null and no ``order``: 0, 1, 2, ..
        cut: how many shorter experiences each is cut into.
        tune_on_first: keep only so many, for choosing hyperparameters; ``num_classes`` stays.
        shape: the shape of time; see ``tasks.shapes.Shape``.
        data_seed: draws permutations and noise, and what ``cut`` and ``shape`` draw. The split never changes.
        head: class-incremental: ``growing``, rows of the read-out are born with their classes; ``whole``,
            they are there from the start.

    Raises:
        InputError: a value that is not allowed.
    """
    setting, change = known_scenario(scenario), None if transform is None else Transform(transform)
    whole(data_seed, "seed.data")
    data = images(dataset)
    if classes_per_experience is None:
        ways = arrange(range(_num_ways(change, setting, num_experiences)), order, seed)
        everything = Experience(0, "", data.train, data.test, tuple(range(len(data.classes))))
        experiences = tuple(replace(everything, index=index) for index in range(len(ways)))
    else:
        experiences = _groups(data, dataset, setting, classes_per_experience, order, seed)
        ways = _ways_of_groups(change, len(experiences), num_experiences)
    if change is not None:
        pairs = zip(experiences, ways, strict=True)
        experiences = tuple(_changed(experience, change, way, data_seed) for experience, way in pairs)
    kind = change.kind if change is not None and classes_per_experience is None else "split"
    count = len(experiences[0].classes) if setting == "domain" else len(data.classes)
    stream = Stream(f"{kind}_{dataset}", "classification", setting, experiences, count, data.input_shape)
    return finish(replace(stream, head=head), tune_on_first, cut, data_seed, shape)


def _groups(
    data: Labelled, dataset: str, scenario: Scenario, per: int, order: Sequence[int] | None, seed: int | None
) -> tuple[Experience, ...]:
    size = group_size(per, len(data.classes), scenario)
    classes = arrange(range(len(data.classes)), order, seed)
    groups = [classes[start : start + size] for start in range(0, len(classes), size)]
    names = [f"{dataset} {'-'.join(map(str, group))}" for group in groups]
    return by_classes(data, groups, scenario, names)


def _num_ways(change: Transform | None, scenario: Scenario, count: int | None) -> int:
    """Experiences with all classes each."""
    if change is None or scenario != "domain":
        raise InputError(
            got=f"all classes in every experience, {'no' if change is None else 'a'} transformation, "
            f"scenario {scenario!r}",
            allowed="a transformation, and scenario domain: every experience has the same classes",
            key="stream.scenario, stream.transform or stream.classes_per_experience",
        )
    if change.ways is None:
        return 5 if count is None else whole(count, "stream.num_experiences", 1)
    _check_no_count(count, "a transformation that lists its ways")
    return len(change.ways)


def _ways_of_groups(change: Transform | None, groups: int, count: int | None) -> list[int]:
    """Group i is seen in the i-th way."""
    _check_no_count(count, "groups of classes")
    if change is not None and change.ways is not None and len(change.ways) < groups:
        raise InputError(
            got=f"{len(change.ways)} ways to change the images of {groups} experiences",
            allowed="a way for each experience",
            key="stream.transform",
        )
    return list(range(groups))


def _check_no_count(count: int | None, beside: str) -> None:
    if count is not None:
        raise InputError(got=f"{count!r} beside {beside}", allowed="null", key="stream.num_experiences")


def _changed(experience: Experience, change: Transform, way: int, seed: int) -> Experience:
    """An experience with tensors of its own."""
    train, test = (
        TensorDataset(_apply(change, data.tensors[0], way, seed, part), data.tensors[1].clone())
        for part, data in (("train", experience.train), ("test", experience.test))
    )
    name = ", ".join(word for word in (experience.name, change.name(way)) if word)
    return replace(experience, name=name, train=train, test=test)


def _apply(change: Transform, inputs: Tensor, way: int, seed: int, part: str) -> Tensor:
    """Images of any shape as (N, H, W), changed, and back; a flat input is a square."""
    side = round(inputs[0].numel() ** 0.5)
    images_NHW = inputs.view(-1, side, side) if inputs.dim() == 2 else inputs
    return change(images_NHW, way, seed, part).reshape(inputs.shape)
