"""Plasticity: how much of what a network has takes part in what it computes.

Legend: n examples, D width of a representation, U hidden units of a layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cl_moe.errors import InputError


def effective_rank(x: Tensor) -> Tensor:
    """exp(-sum p ln p), p the singular values divided by their sum (Roy & Vetterli 2007); in [1, min(n, D)].

    The variant: of ``x`` as it is, neither centred nor scaled, as in Kumar et al. 2021 and Dohare et al. 2024
    (whose "feature rank" of Lyle et al. 2022 counts the values above a threshold instead).

    Args:
        x: (n, D), one representation per row.

    Returns:
        () float64; NaN for no rows, for zeros alone and for what is not finite.

    Raises:
        InputError: ``x`` is no matrix.

    >>> round(effective_rank(torch.eye(3)).item(), 6), round(effective_rank(torch.ones(4, 2)).item(), 6)
    (3.0, 1.0)
    """
    if x.ndim != 2:
        raise InputError(got=f"x of shape {tuple(x.shape)}", allowed="(n, D)", key="x")
    x_nD = x.detach().double()
    total = x_nD.abs().sum()
    if not total.isfinite() or total == 0:
        return x_nD.new_full((), torch.nan)
    value = torch.linalg.svdvals(x_nD / x_nD.abs().max())  # scaled, since squares of tiny numbers vanish
    p = value / value.sum()
    return torch.special.entr(p).sum().exp()


def dormant_fraction(activity: Tensor, tau: float) -> Tensor:
    """Share of tau-dormant units: E|h_i| / mean_k E|h_k| <= tau (Sokar et al. 2023, equation 1); in [0, 1].

    A layer in which nothing is active at all is dormant as a whole. No layer is at any tau < 1 otherwise: the
    mean is not below itself.

    Args:
        activity: (U,) >= 0, E|h_i| over some inputs.
        tau: >= 0; the paper has 0 and .025, and .1.

    Returns:
        () float64; NaN for no units.

    Raises:
        InputError: ``activity`` is no vector, or ``tau`` is negative.

    >>> activity = torch.tensor([0.0, 0.5, 1.5, 2.0])
    >>> [dormant_fraction(activity, tau).item() for tau in (0.0, 0.5, 1.5)]
    [0.25, 0.5, 0.75]
    """
    if activity.ndim != 1 or not tau >= 0:
        raise InputError(
            got=f"activity of shape {tuple(activity.shape)}, tau={tau}",
            allowed="a vector (U,), and tau >= 0",
            key="activity, tau",
        )
    if not activity.numel():
        return torch.full((), torch.nan, dtype=torch.float64)
    activity_U = activity.detach().double()
    return (activity_U <= tau * activity_U.mean()).double().mean()
