"""Labelled data, and how it becomes experiences: by groups of classes, or by domain.

Legend: n examples, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from cl_moe.errors import InputError
from cl_moe.stream import SCENARIOS, Experience, Scenario, take
from tasks.arrange import whole


@dataclass(frozen=True)
class Labelled:
    """Examples with classes.

    Args:
        train: inputs (n, ...) and targets (n,) int64, numbers of classes.
        test: the same, held out.
        classes: names of the C classes, by number.
        domains: names of the domains, in natural order; empty where there are none.
        train_domains: (n,) int64: which domain an example of ``train`` is from; None where there are none.
        test_domains: the same for ``test``.
    """

    train: TensorDataset
    test: TensorDataset
    classes: tuple[str, ...]
    domains: tuple[str, ...] = ()
    train_domains: Tensor | None = field(default=None, repr=False)
    test_domains: Tensor | None = field(default=None, repr=False)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of one input."""
        return tuple(self.train.tensors[0].shape[1:])


def known_scenario(scenario: str) -> Scenario:
    """The scenario, if it is one."""
    if scenario not in SCENARIOS:
        raise InputError(got=f"{scenario!r}", allowed=", ".join(SCENARIOS), key="stream.scenario")
    return cast(Scenario, scenario)


def group_size(per_experience: int, num_classes: int, scenario: str, what: str = "classes") -> int:
    """Classes per experience: a divisor of their number, so that no remainder is dropped.

    1 only with ``class``: elsewhere nothing would be left to choose and any model would score 1.
    """
    key = "stream.classes_per_experience"
    low = 1 if scenario == "class" else 2
    divisors = [size for size in range(low, num_classes + 1) if num_classes % size == 0]
    size = whole(per_experience, key, what=f"one of {divisors}")
    if size not in divisors:
        raise InputError(
            got=f"{size} classes per experience of {num_classes} {what} in scenario {scenario!r}",
            allowed=", ".join(map(str, divisors)) or "scenario class",
            key=key,
        )
    return size


def by_classes(
    data: Labelled, groups: Sequence[Sequence[int]], scenario: Scenario, names: Sequence[str]
) -> tuple[Experience, ...]:
    """One experience per group of classes.

    Args:
        data: its rows keep their order; those of classes in no group are left out.
        groups: numbers of classes, all different.
        scenario: ``class``: labels are the classes' numbers. ``task``: the same, with the group's number as
            task label. ``domain``: a label is the place of a class in its group, so all must be equally
            large.
        names: of the experiences.

    Raises:
        InputError: ``domain`` with groups of unequal sizes.
    """
    if scenario == "domain" and len({len(group) for group in groups}) > 1:
        sizes = ", ".join(f"{name}: {len(group)}" for name, group in zip(names, groups, strict=True))
        raise InputError(
            got=f"experiences of unequal numbers of classes ({sizes}) in scenario 'domain'",
            allowed="class or task; or groups of one size, whose labels can be shared",
            key="stream.scenario",
        )
    experiences = []
    for index, (group, name) in enumerate(zip(groups, names, strict=True)):
        labels = list(range(len(group))) if scenario == "domain" else list(group)
        train, test = (
            _relabelled(part, group, labels, len(data.classes)) for part in (data.train, data.test)
        )
        label = index if scenario == "task" else None
        experiences.append(Experience(index, name, train, test, tuple(labels), label))
    return tuple(experiences)


def by_domains(data: Labelled, order: Sequence[int], scenario: Scenario) -> tuple[Experience, ...]:
    """One experience per domain, in this order; labels are the classes' numbers.

    Raises:
        InputError: ``task`` where a class stands in several domains; ``domain`` where two have other classes.
    """
    assert data.train_domains is not None
    assert data.test_domains is not None
    experiences = []
    for index, number in enumerate(order):
        train = take(data.train, (data.train_domains == number).nonzero().squeeze(1))
        test = take(data.test, (data.test_domains == number).nonzero().squeeze(1))
        classes = tuple(train.tensors[1].unique().tolist())
        label = index if scenario == "task" else None
        experiences.append(Experience(index, data.domains[number], train, test, classes, label))
    check_classes(experiences, scenario, data.classes)
    return tuple(experiences)


def check_classes(experiences: Sequence[Experience], scenario: Scenario, names: Sequence[str]) -> None:
    """Refuse experiences that come with classes of their own, where the scenario does not allow it.

    Args:
        experiences: at least one.
        scenario: ``task``: no class in two of them; ``domain``: the same classes in all; ``class``: any.
        names: of the classes, by number.
    """
    seen: dict[int, str] = {}
    for experience in experiences:
        if shared := [label for label in experience.classes if label in seen and scenario == "task"]:
            raise InputError(
                got=f"class {names[shared[0]]!r} in {seen[shared[0]]!r} and in {experience.name!r}",
                allowed="class or domain: a class of two tasks has no head of its own",
                key="stream.scenario",
            )
        seen.update(dict.fromkeys(experience.classes, experience.name))
        first = experiences[0]
        if scenario == "domain" and set(experience.classes) != set(first.classes):
            raise InputError(
                got=f"domains {first.name!r} and {experience.name!r} with other classes",
                allowed="class or task; domain is for the same classes everywhere",
                key="stream.scenario",
            )


def _relabelled(
    data: TensorDataset, group: Sequence[int], labels: Sequence[int], count: int
) -> TensorDataset:
    """The rows of some classes, in the order of the data, each class under its label."""
    inputs, targets = data.tensors
    label_of_C = torch.full((count,), -1)
    label_of_C[torch.tensor(group)] = torch.tensor(labels)
    rows = (label_of_C[targets] >= 0).nonzero().squeeze(1)
    return TensorDataset(inputs[rows], label_of_C[targets[rows]])
