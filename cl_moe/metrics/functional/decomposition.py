"""Forgetting told apart: what the weights forgot, and what routing did.

Legend: T experiences, row i: after i experiences, column c: the experience with index c.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cl_moe.errors import InputError


class Forgotten(NamedTuple):
    """Two parts of forgetting per experience, (T - 1,) each, in the unit of R; they add up to its fall.

    Args:
        weights: R[j, j] - R_w[T, j].
        routing: R_w[T, j] - R[T, j]; for a head that grows with the classes, new classes too.
    """

    weights: Tensor
    routing: Tensor


def decomposed_forgetting(R: Tensor, rewound_T: Tensor) -> Forgotten:
    """F = R[j, j] - R[T, j] of every old experience (minus backward transfer), in two parts.

    The score of the final model with its router rolled back to the end of j, without experts and classes born
    later, tells them apart: what is missing there the weights forgot, the rest routing did. It uses the
    experience's identity: a diagnostic, never a result. Either part may be negative.

    Args:
        R: (T + 1, T).
        rewound_T: (T,) R_w[T, j]; NaN where it was not measured. The last one is not used.

    Raises:
        InputError: the shapes do not fit.

    >>> R = torch.tensor([[.1, .1], [.9, .1], [.5, .8]], dtype=torch.float64)
    >>> parts = decomposed_forgetting(R, torch.tensor([.75, .8], dtype=torch.float64))
    >>> [round(part.item(), 4) for part in parts]
    [0.15, 0.25]
    """
    if R.ndim != 2 or R.shape[0] != R.shape[1] + 1 or rewound_T.shape != R.shape[1:]:
        raise InputError(
            got=f"R of shape {tuple(R.shape)} and rewound scores of shape {tuple(rewound_T.shape)}",
            allowed="(T + 1, T) and (T,)",
            key="rewound_T",
        )
    R, rewound_T = R.detach().double(), rewound_T.detach().double()
    learnt_T = R.diagonal(offset=-1)
    return Forgotten((learnt_T - rewound_T)[:-1], (rewound_T - R[-1])[:-1])


def forgetting_weights(R: Tensor, rewound_T: Tensor) -> Tensor:
    """Mean over old experiences of what the weights forgot; NaN at T = 1. See ``decomposed_forgetting``."""
    return _mean(decomposed_forgetting(R, rewound_T).weights)


def forgetting_routing(R: Tensor, rewound_T: Tensor) -> Tensor:
    """Mean over old experiences of what routing forgot; NaN at T = 1.

    Together with ``forgetting_weights`` it is minus backward transfer.
    """
    return _mean(decomposed_forgetting(R, rewound_T).routing)


def _mean(values: Tensor) -> Tensor:
    return values.mean() if values.numel() else values.new_full((), torch.nan)
