"""Numbers of a layer that cannot be, refused where they are given."""

from __future__ import annotations

import math
from numbers import Integral, Real

from cl_moe.errors import InputError


def whole(name: str, value: object, least: int, key: str) -> int:
    """``value`` itself, if it is a whole number of at least ``least``; True and 2.0 are none.

    >>> whole("k", 2, least=1, key="router.k")
    2
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise InputError(got=f"{name}={value}", allowed=f"a whole number, at least {least}", key=key)
    return int(value)


def number(name: str, value: object, key: str, above: bool = False) -> float:
    """``value`` itself, if it is finite and at least 0, or with ``above`` larger than 0.

    >>> number("z_loss", 0.001, key="router.z_loss")
    0.001
    """
    real = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if not real or not (value > 0 if above else value >= 0):  # type: ignore[operator]
        raise InputError(
            got=f"{name}={value}", allowed=f"a finite number {'>' if above else '>='} 0", key=key
        )
    return value  # type: ignore[return-value]


def check_experts(
    num_experts: int, hidden: int | None, num_shared: int, dropout: float, glu: bool, num_noops: int
) -> None:
    """Refuse feed-forward experts that cannot be: see ``MoE``."""
    whole("num_experts", num_experts, least=1, key="layer.num_experts")
    if hidden is not None:
        whole("hidden", hidden, least=1, key="layer.hidden")
    elif num_shared or dropout or glu:
        raise InputError(
            got=f"hidden=null with num_shared={num_shared}, dropout={dropout}, glu={glu}",
            allowed="a hidden width (layer.hidden), or none of the three",
            key="layer.hidden",
        )
    for name, value in (("num_shared", num_shared), ("num_noops", num_noops)):
        whole(name, value, least=0, key=f"layer.{name}")
    if not 0 <= dropout < 1:
        raise InputError(got=f"dropout={dropout}", allowed="0 <= dropout < 1", key="layer.dropout")
