"""Calibration: whether a classifier is right as often as it is sure.

Legend: B examples, M bins of confidence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cl_moe.errors import InputError

NUM_BINS = 15
"""Of Guo et al. 2017."""


def calibration_bins(confidence: Tensor, right: Tensor, num_bins: int = NUM_BINS) -> Tensor:
    """Sums over bins of equal width, (M, 3) float64: examples, their confidences, right answers.

    Bin m holds ((m - 1) / M, m / M] (Guo et al. 2017, section 2), the first one 0 as well. Sums of parts add
    up to those of the whole.

    Args:
        confidence: (B,) in [0, 1], the probability of the answer given.
        right: (B,) bool.
        num_bins: M >= 1.

    Raises:
        InputError: other shapes, or no bins.
    """
    if confidence.ndim != 1 or right.shape != confidence.shape or num_bins < 1:
        raise InputError(
            got=f"shapes {tuple(confidence.shape)} and {tuple(right.shape)}, num_bins={num_bins}",
            allowed="two vectors of one length, and at least 1 bin",
            key="confidence, right, num_bins",
        )
    confidence_B = confidence.detach().double()
    edges = torch.linspace(0, 1, num_bins + 1, dtype=torch.float64, device=confidence.device)[1:-1]
    bin_B = torch.bucketize(confidence_B, edges)
    sums_M3 = torch.zeros(num_bins, 3, dtype=torch.float64, device=confidence.device)
    columns = [torch.ones_like(confidence_B), confidence_B, right.double()]
    return sums_M3.index_add_(0, bin_B, torch.stack(columns, dim=1))


def binned_calibration_error(sums_M3: Tensor) -> Tensor:
    """sum_m |B_m| / n |acc(B_m) - conf(B_m)| (Guo et al. 2017, equation 3) of ``calibration_bins``.

    Args:
        sums_M3: (..., M, 3): examples, sum of confidences, right answers of each bin.

    Returns:
        (...) float64 in [0, 1]; NaN where there are no examples.
    """
    count_M, confidence_M, right_M = sums_M3.double().unbind(dim=-1)
    return (right_M - confidence_M).abs().sum(dim=-1) / count_M.sum(dim=-1)  # 0 / 0 is NaN


def calibration_error(confidence: Tensor, right: Tensor, num_bins: int = NUM_BINS) -> Tensor:
    """Expected calibration error (Guo et al. 2017, equation 3), () float64 in [0, 1]; NaN of nothing.

    Args:
        confidence: (B,) in [0, 1], the probability of the answer given.
        right: (B,) bool.
        num_bins: of equal width, the paper's 15.

    >>> calibration_error(torch.tensor([0.75, 0.75]), torch.tensor([True, False])).item()
    0.25
    """
    return binned_calibration_error(calibration_bins(confidence, right, num_bins))
