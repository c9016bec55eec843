"""Permuted digits: all ten classes in every experience, the pixels in another fixed order each time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cl_moe.errors import InputError
from cl_moe.stream import Stream
from tasks.arrange import whole
from tasks.image_stream import image_stream


def permuted_digits(
    num_experiences: int = 5,
    scenario: str = "domain",
    order: Sequence[int] | None = None,
    seed: int | None = None,
    cut: int = 1,
    tune_on_first: int | None = None,
    shape: Mapping[str, object] | None = None,
    data_seed: int = 0,
) -> Stream:
    """Fixed pixel permutations of scikit-learn's digits; inputs (n, 64) float32 in [0, 1], labels 0 .. 9.

    Args:
        num_experiences: how many permutations, at least 1. Permutation 0 is the identity.
        scenario: ``domain`` only. The labels are the same in every experience, so there is neither a class to
            arrive nor a choice that a task label would narrow.
        order: the permutations in order of arrival, a permutation of 0 .. num_experiences - 1.
        seed: draws that order; null and no ``order``: 0, 1, 2, ..
        cut: how many shorter experiences each is cut into.
        tune_on_first: keep only so many permutations, for choosing hyperparameters.
        shape: the shape of time; see ``tasks.shapes.Shape``.
        data_seed: draws the permutations, and what ``cut`` and ``shape`` draw.

    Raises:
        InputError: a value that is not allowed.
    """
    if scenario != "domain":
        raise InputError(
            got=f"{scenario!r}",
            allowed="domain: every experience has the same ten classes",
            key="stream.scenario",
        )
    return image_stream(
        "digits",
        scenario,
        None,
        {"kind": "permuted"},
        whole(num_experiences, "stream.num_experiences", 1),
        order,
        seed,
        cut,
        tune_on_first,
        shape,
        data_seed,
    )
