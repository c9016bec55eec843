"""Streams of images: an image set, cut by classes, changed by a transformation, or both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from cl_moe.stream import Experience, Scenario, Stream
from tasks.arrange import arrange, finish, whole
from tasks.changing import changed, check_no_count, ways_of_a_whole
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
        num_experiences: how many ways a transformation has that does not list them (``permuted``, colours by
            class; null: 5); null for others, and beside groups.
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
        allowed = "a transformation, and scenario domain: every experience has the same classes"
        ways = arrange(range(ways_of_a_whole(change, setting, num_experiences, allowed)), order, seed)
        everything = Experience(0, "", data.train, data.test, tuple(range(len(data.classes))))
        experiences = tuple(replace(everything, index=index) for index in range(len(ways)))
    else:
        check_no_count(num_experiences, "groups of classes")
        experiences = _groups(data, dataset, setting, classes_per_experience, order, seed)
        ways = list(range(len(experiences)))
    kind = change.kind if change is not None and classes_per_experience is None else "split"
    count = len(experiences[0].classes) if setting == "domain" else len(data.classes)
    stream = Stream(f"{kind}_{dataset}", "classification", setting, experiences, count, data.input_shape)
    stream = replace(changed(stream, change, ways, data_seed), head=head)
    return finish(stream, tune_on_first, cut, data_seed, shape)


def _groups(
    data: Labelled, dataset: str, scenario: Scenario, per: int, order: Sequence[int] | None, seed: int | None
) -> tuple[Experience, ...]:
    size = group_size(per, len(data.classes), scenario)
    classes = arrange(range(len(data.classes)), order, seed)
    groups = [classes[start : start + size] for start in range(0, len(classes), size)]
    names = [f"{dataset} {'-'.join(map(str, group))}" for group in groups]
    return by_classes(data, groups, scenario, names)
