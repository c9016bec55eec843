"""The digits as other platforms were measured on them, in three scenarios of one name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cl_moe.stream import Stream
from tasks.permuted_digits import permuted_digits
from tasks.split_digits import split_digits


def peers_digits(
    scenario: str = "class",
    order: Sequence[int] | None = None,
    seed: int | None = None,
    cut: int = 1,
    tune_on_first: int | None = None,
    head: str = "whole",
) -> Stream:
    """Five experiences; inputs (n, 64) float32 in [0, 1].

    Class- and task-incremental: two digits at a time (``split_digits``). Domain-incremental: all ten digits
    under five pixel permutations, the same ones for every seed, the first the identity (``permuted_digits``).

    Args:
        scenario: ``class``, ``task`` or ``domain``.
        order: the ten classes, or for ``domain`` the five permutations, in order of arrival; null: 0, 1, ..
        seed: draws that order.
        cut: how many shorter experiences each is cut into, by the same draw for every seed.
        tune_on_first: keep only so many experiences, for choosing hyperparameters.
        head: class-incremental: ``whole``, one read-out of ten rows from the start, as the others have it; or
            ``growing``, rows are born with their classes.

    Raises:
        InputError: a value that is not allowed.
    """
    if scenario == "domain":
        return permuted_digits(order=order, seed=seed, cut=cut, tune_on_first=tune_on_first)
    digits = split_digits(scenario=scenario, order=order, seed=seed, cut=cut, tune_on_first=tune_on_first)
    return replace(digits, head=head)
