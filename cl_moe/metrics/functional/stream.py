"""Stream metrics: what the accuracy matrix R says about learning and forgetting.

R has shape (T + 1, T). Row 0 is measured before any training, row i after i experiences; column c is the
experience with index c, so the score just after learning it is R[c + 1, c], what the papers write R[j, j]
with j = c + 1. Scores are higher-is-better: accuracies in [0, 1], or minus a loss (nats, squared errors).
Nothing here depends on the range, so transfers and forgetting keep the unit of R.

Legend: T experiences seen, row i: after i experiences, column c: the experience with index c.

The worked example of these pages:

>>> R = torch.tensor([[.10, .20, .15, .10],  # before training
...                   [.70, .90, .20, .10],
...                   [.90, .60, .30, .20],
...                   [.85, .65, .80, .30],
...                   [.80, .50, .75, .90]], dtype=torch.float64)
>>> round(average_accuracy(R).item(), 4), round(forgetting(R).item(), 4)
(0.7375, 0.1)
>>> round(backward_transfer(R).item(), 4), round(forward_transfer(R).item(), 4)
(-0.0167, 0.35)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cl_moe.errors import InputError


def up_to(R: Tensor, i: int) -> Tensor:
    """What is known at point i: rows <= i and the experiences trained so far, (i + 1, i).

    Args:
        R: (rows, T) with at least i + 1 rows; a run's matrix need not be complete.
        i: number of experiences trained, 0 .. T. At i = 0 the view is (1, 0), and every metric of it is NaN.

    Raises:
        InputError: no row i yet, or fewer than i experiences.
    """
    if R.ndim != 2 or not 0 <= i < R.shape[0] or i > R.shape[1]:
        raise InputError(
            got=f"i = {i} for a matrix of shape {tuple(R.shape)}",
            allowed="a (rows, T) matrix with 0 <= i < rows and i <= T",
            key="i",
        )
    return R[: i + 1, :i]


def average_accuracy(R: Tensor) -> Tensor:
    """Mean final score, A_T = 1/T sum_j R[T, j] (Lopez-Paz & Ranzato 2017; Chaudhry et al. 2018).

    >>> average_accuracy(torch.tensor([[.5, .5], [1., .5], [.75, .5]])).item()
    0.625
    """
    return _mean(_checked(R)[-1])


def forgetting_per_experience(R: Tensor) -> Tensor:
    """How far each experience's score lies below its best past one (Chaudhry et al. 2018), (T,).

    f_j = max_{j <= l <= T-1} R[l, j] - R[T, j]. The maximum starts when j was learnt and leaves the last row
    out, so a value may be negative: the experience got better than it ever was. The last experience has no
    past since it was learnt: NaN.

    Elsewhere, on purpose not here: first minus last (Avalanche), a maximum over all rows and so never
    negative (Mammoth, PyCIL), a maximum that also sees rows before j was learnt (Renate).

    >>> forgetting_per_experience(torch.tensor([[.5, .5], [.75, .5], [.5, 1.]]))
    tensor([0.2500,    nan], dtype=torch.float64)
    """
    R = _checked(R)
    T = R.shape[1]
    forgotten_T = R.new_full((T,), torch.nan)
    for c in range(T - 1):
        forgotten_T[c] = R[c + 1 : T, c].max() - R[T, c]
    return forgotten_T


def forgetting(R: Tensor) -> Tensor:
    """Average forgetting over all experiences but the last (Chaudhry et al. 2018); NaN at T = 1.

    Positive: worse than before. See ``forgetting_per_experience`` for the variant and for the others.
    """
    return _mean(forgetting_per_experience(R)[:-1])


def backward_transfer(R: Tensor) -> Tensor:
    """1/(T-1) sum_{j<T} (R[T, j] - R[j, j]) (Lopez-Paz & Ranzato 2017); NaN at T = 1.

    Negative: later experiences hurt earlier ones. The paper's T - 1, on purpose: GEM's own code divides by
    T, and Continuum implements the form of Diaz-Rodriguez et al. (2018), which averages over all rows.
    """
    R = _checked(R)
    return _mean((R[-1] - R.diagonal(offset=-1))[:-1])


def forward_transfer(R: Tensor) -> Tensor:
    """1/(T-1) sum_{j>=2} (R[j-1, j] - b_j), b = R[0] (Lopez-Paz & Ranzato 2017); NaN at T = 1.

    The score on an experience just before it is trained, above what the random initialisation scored. b_j is
    measured: it is never assumed to be 1 / classes.
    """
    R = _checked(R)
    return _mean((R.diagonal() - R[0])[1:])


def average_anytime_accuracy(R: Tensor) -> Tensor:
    """Mean over i = 1..T of the mean of R[i, j <= i] (Caccia et al. 2022, AAA).

    >>> average_anytime_accuracy(torch.tensor([[0., 0.], [1., 0.], [.5, .5]])).item()
    0.75
    """
    R = _checked(R)
    means = [R[i, :i].mean() for i in range(1, R.shape[0])]
    return torch.stack(means).mean() if means else R.new_full((), torch.nan)


def learning_accuracy(R: Tensor) -> Tensor:
    """Mean of R[j, j]: the score just after learning (Riemer et al. 2019)."""
    return _mean(_checked(R).diagonal(offset=-1))


def intransigence(R: Tensor, cumulative: Tensor) -> Tensor:
    """What continual training kept from being learnt (Chaudhry et al. 2018), averaged over experiences.

    Mean over j of C[j, j] - R[j, j], where C is the matrix of a cumulative run: a model trained on the data
    of all experiences so far. Positive: the stream learnt its newest experience worse than joint training
    did.

    Args:
        R: (T + 1, T).
        cumulative: (T + 1, T), the same stream under ``strategy=cumulative``.

    Raises:
        InputError: the shapes differ.
    """
    R, cumulative = _checked(R), _checked(cumulative, "cumulative")
    if R.shape != cumulative.shape:
        raise InputError(
            got=f"R of shape {tuple(R.shape)} and cumulative of shape {tuple(cumulative.shape)}",
            allowed="two matrices of one stream, of the same shape (T + 1, T)",
            key="cumulative",
        )
    return _mean((cumulative - R).diagonal(offset=-1))


def min_accuracy(R: Tensor, anytime: Sequence[Tensor] | Tensor | None = None) -> Tensor:
    """min-ACC: the worst score of each experience since it was learnt, averaged (De Lange et al. 2023).

    1/(T-1) sum_{j<T} min_n A(E_j, f_n) over all evaluations n strictly after j was learnt; NaN at T = 1. The
    rows are such evaluations and always count, so min-ACC never exceeds the average accuracy of the old
    experiences. Without ``anytime`` it misses the stability gap, which opens and closes between two rows.

    Args:
        R: (T + 1, T).
        anytime: the evaluations made inside the experiences: entry e has shape (n_e, T) and holds, in order,
            the scores on every experience measured while the experience with index e was trained; n_e may be
            0, and NaN marks what was not evaluated. A tensor (T, n, T) serves where every n_e is the same.

    Raises:
        InputError: ``anytime`` has not T entries of shape (n_e, T).

    >>> R = torch.tensor([[.5, .5], [1., .5], [.75, 1.]])
    >>> min_accuracy(R).item()
    0.75
    >>> min_accuracy(R, anytime=[torch.empty(0, 2), torch.tensor([[.25, .5], [.5, .75]])]).item()
    0.25
    """
    R = _checked(R)
    T = R.shape[1]
    inside = _checked_anytime(anytime, T)
    worst = []
    for c in range(T - 1):
        later = torch.cat([R[c + 2 :, c], *(scores[:, c].to(R) for scores in inside[c + 1 :])])
        worst.append(later[~later.isnan()].amin() if not later.isnan().all() else R.new_full((), torch.nan))
    return torch.stack(worst).mean() if worst else R.new_full((), torch.nan)


def worst_case_accuracy(R: Tensor, anytime: Sequence[Tensor] | Tensor | None = None) -> Tensor:
    """WC-ACC = 1/T A(E_T, f_T) + (1 - 1/T) min-ACC (De Lange et al. 2023); NaN at T = 1.

    Args:
        R: (T + 1, T).
        anytime: as for ``min_accuracy``.
    """
    lowest, R = min_accuracy(R, anytime), _checked(R)
    T = R.shape[1]
    return lowest if T == 0 else R[T, T - 1] / T + (1 - 1 / T) * lowest


def _mean(values: Tensor) -> Tensor:
    """The mean, NaN of nothing."""
    return values.mean() if values.numel() else values.new_full((), torch.nan)


def _checked(R: Tensor, key: str = "R") -> Tensor:
    """R in float64, if it has one row more than columns."""
    if R.ndim != 2 or R.shape[0] != R.shape[1] + 1:
        raise InputError(
            got=f"{key} of shape {tuple(R.shape)}",
            allowed="(T + 1, T): row 0 before any training, then one row after each of T experiences",
            key=key,
        )
    return R.detach().double()


def _checked_anytime(anytime: Sequence[Tensor] | Tensor | None, T: int) -> Sequence[Tensor]:
    """``anytime`` as a sequence, one (n_e, T) tensor for every experience."""
    if anytime is None:
        return []
    inside = list(anytime)
    if len(inside) != T or any(scores.ndim != 2 or scores.shape[1] != T for scores in inside):
        raise InputError(
            got=f"{len(inside)} entries of shapes {[tuple(scores.shape) for scores in inside]}",
            allowed=f"{T} entries of shape (n_e, {T}): the evaluations made while experience e was trained",
            key="anytime",
        )
    return inside
