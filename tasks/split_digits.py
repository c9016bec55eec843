"""Split digits: the ten classes of scikit-learn's digits arrive in groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cl_moe.stream import Stream
from tasks.image_stream import image_stream
from tasks.labelled import group_size, known_scenario


def split_digits(
    scenario: str = "class",
    classes_per_experience: int = 2,
    order: Sequence[int] | None = None,
    seed: int | None = None,
    cut: int = 1,
    tune_on_first: int | None = None,
    shape: Mapping[str, object] | None = None,
    data_seed: int = 0,
) -> Stream:
    """Consecutive groups of digit classes; inputs (n, 64) float32 in [0, 1], 1,437 train and 360 test images.

    Args:
        scenario: ``class``: labels 0 .. 9, no task label. ``task``: the same, ``task_label`` is the number of
            the group. ``domain``: a label is the place of a class within its group, so that all groups share
            the labels 0 .. classes_per_experience - 1 (van de Ven et al. 2022, split protocol).
        classes_per_experience: 1, 2, 5 or 10; a remainder is refused, never dropped. 1 only with ``class``:
            elsewhere nothing would be left to choose and any model would score 1.
        order: the classes in order of arrival, a permutation of 0 .. 9.
        seed: draws that order; null and no ``order``: 0, 1, .., 9.
        cut: how many shorter experiences each group is cut into.
        tune_on_first: keep only so many groups, for choosing hyperparameters; ``num_classes`` stays.
        shape: the shape of time; see ``tasks.shapes.Shape``.
        data_seed: draws what ``cut`` and ``shape`` draw. The train/test split never changes.

    Raises:
        InputError: a value that is not allowed.
    """
    return image_stream(
        "digits",
        scenario,
        group_size(classes_per_experience, 10, known_scenario(scenario)),
        order=order,
        seed=seed,
        cut=cut,
        tune_on_first=tune_on_first,
        shape=shape,
        data_seed=data_seed,
    )
