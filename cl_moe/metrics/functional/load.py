"""Load metrics: how evenly the experts of one layer are used.

Each takes a load of shape (N,), not normalised and >= 0: the score-weighted load z (gating weights
accumulated per expert, ``ExpertLoad.score``) or the routed-slot counts c (``ExpertLoad.count``). Where the
literature means one of the two, the docstring says which. Sum over batches and ranks first: ratios do not
add. A load of nothing, and a layer without experts, give NaN (but no expert of a silent layer is in use:
usage is 0).

PEER: 2407.04153. Legend: N experts; p or z below: the load divided by its sum; ln: natural logarithm.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cl_moe.errors import InputError


def usage(load_N: Tensor) -> Tensor:
    """Share of experts chosen at all, #{z_i > 0} / N, in [0, 1] (Lample et al. 2019; PEER section 3).

    >>> usage(torch.tensor([3., 0., 1., 0.])).item()
    0.5
    """
    return _share(_checked(load_N) > 0)


def unevenness(load_N: Tensor) -> Tensor:
    """KL(z || uniform) = ln N + sum z ln z in nats, in [0, ln N] (Lample et al. 2019; PEER section 3).

    Of the score-weighted load z, natural log: 0 when uniform, ln N when one expert takes everything.

    >>> unevenness(torch.tensor([1., 1., 1.])).item(), round(unevenness(torch.tensor([5., 0.])).item(), 6)
    (0.0, 0.693147)
    """
    ratio_N = _relative(_checked(load_N))
    # Mean of r ln r, r = N z: exactly 0 for a uniform load, where ln N + sum z ln z leaves rounding behind.
    return _mean(torch.xlogy(ratio_N, ratio_N))


def normalized_entropy(load_N: Tensor) -> Tensor:
    """H(z) / ln N, in [0, 1]: 1 when uniform; NaN for a single expert, whose entropy has no scale."""
    N = load_N.numel()
    return 1 - unevenness(load_N) / (math.log(N) if N > 1 else math.nan)


def effective_experts(load_N: Tensor) -> Tensor:
    """exp H(z) = N exp(-KL), in [1, N]: how many evenly used experts would have the same entropy.

    >>> effective_experts(torch.tensor([2., 2., 2., 2.])).item()
    4.0
    """
    return load_N.numel() * torch.exp(-unevenness(load_N))


def gini(load_N: Tensor) -> Tensor:
    """Gini coefficient sum_ij |c_i - c_j| / (2 N^2 mean c), in [0, 1 - 1/N]; of the counts, 0 when uniform.

    The plain coefficient of the N experts; the small-sample form, times N / (N - 1), is not used.

    >>> gini(torch.tensor([0., 0., 0., 7.])).item()
    0.75
    """
    ratio_N = _relative(_checked(load_N)).sort().values
    N = ratio_N.numel()
    rank_N = torch.arange(1, N + 1, device=ratio_N.device, dtype=ratio_N.dtype)
    return _mean((2 * rank_N - N - 1) * ratio_N) / max(N, 1)


def max_violation(load_N: Tensor) -> Tensor:
    """MaxVio = max c / mean c - 1, in [0, N - 1]; of the counts (DeepSeek, 2408.15664).

    >>> max_violation(torch.tensor([1., 1., 4.])).item()
    1.0
    """
    ratio_N = _relative(_checked(load_N))
    return ratio_N.amax() - 1 if ratio_N.numel() else ratio_N.new_full((), torch.nan)


def dead_fraction(load_N: Tensor) -> Tensor:
    """Share of experts with p < 1 / (10 N), less than a tenth of an even share, in [0, 1); of the counts."""
    load_N = _checked(load_N)
    dead = _share(load_N * 10 * load_N.numel() < load_N.sum())  # this side of the division: exact for counts
    return dead if load_N.sum() > 0 else torch.full_like(dead, torch.nan)


def squared_cv(load_N: Tensor) -> Tensor:
    """CV^2 = Var(c) / Mean(c)^2 with the population's variance, in [0, N - 1] (Shazeer et al. 2017).

    >>> squared_cv(torch.tensor([0., 2.])).item()
    1.0
    """
    return _mean((_relative(_checked(load_N)) - 1).square())


def drop_rate(kept: Tensor, slots: Tensor) -> Tensor:
    """1 - kept / slots, in [0, 1]: the share of routed slots (tokens x k) that a capacity dropped.

    Args:
        kept: () slots that were computed.
        slots: () slots that were routed, dropped ones included; padding in neither. 0: NaN.

    Raises:
        InputError: not 0 <= kept <= slots.

    >>> drop_rate(torch.tensor(3), torch.tensor(4)).item()
    0.25
    """
    kept, slots = kept.detach().double(), slots.detach().double()
    if not 0 <= kept <= slots:
        raise InputError(
            got=f"kept = {kept.item():g} of slots = {slots.item():g}",
            allowed="0 <= kept <= slots",
            key="kept",
        )
    return 1 - kept / slots


def _relative(load_N: Tensor) -> Tensor:
    """The load in units of an even share, N load / sum load; NaN throughout where the sum is 0."""
    scaled_N = (
        load_N / load_N.amax() if load_N.numel() else load_N
    )  # no overflow, and equal loads are exactly 1
    return scaled_N * load_N.numel() / scaled_N.sum()


def _mean(values: Tensor) -> Tensor:
    """The mean, NaN of nothing."""
    return values.mean() if values.numel() else values.new_full((), torch.nan)


def _share(flags: Tensor) -> Tensor:
    """Share of True; NaN of nothing."""
    return _mean(flags.double())


def _checked(load_N: Tensor) -> Tensor:
    """The load in float64, if it is a vector of finite numbers >= 0."""
    if load_N.ndim != 1:
        raise InputError(
            got=f"a load of shape {tuple(load_N.shape)}", allowed="(N,), one number per expert", key="load"
        )
    load_N = load_N.detach().double()
    if not bool(((load_N >= 0) & (load_N < torch.inf)).all()):
        raise InputError(
            got="a load with negative or non-finite entries",
            allowed="finite sums of gating weights or counts, >= 0",
            key="load",
        )
    return load_N
