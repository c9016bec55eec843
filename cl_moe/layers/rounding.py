"""Shares of a sequence as whole numbers of tokens: one rule for routers and depth.

A share is rounded at 9 decimals first, so that what is whole but for the computer's last bits stays whole:
1.1 times 10 is 11, though in float64 it is 11.000000000000002. Both forms compute the same, bit by bit.

Legend: G sequences.
"""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor

Rounding = Literal["ceil", "floor"]


def whole_share(num_tokens: int, factor: float, parts: int = 1, rounding: Rounding = "ceil") -> int:
    """``num_tokens x factor / parts``, rounded.

    >>> whole_share(10, 1.1), whole_share(7, 1.25, 2), whole_share(7, 1.25, 2, "floor")
    (11, 5, 4)
    """
    share = round(num_tokens * factor / parts * 1e9) / 1e9
    return math.ceil(share) if rounding == "ceil" else math.floor(share)


def whole_shares(num_tokens_G: Tensor, factor: float, parts: int = 1, rounding: Rounding = "ceil") -> Tensor:
    """(G,) int64: ``whole_share`` of each sequence; any shape will do."""
    share_G = (num_tokens_G.double() * factor / parts).round(decimals=9)
    return (share_G.ceil() if rounding == "ceil" else share_G.floor()).long()
