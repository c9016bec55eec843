"""Claims about arms: how they are written, and whether the runs bear them out."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from cl_moe.errors import InputError
from cl_moe.tracking.compare.arms import Arm
from cl_moe.tracking.compare.statistics import Contrast, Inference, contrast
from cl_moe.tracking.compare.table import p_text, signed

_CLAIM = re.compile(r"(\S+) (\S+) (below|above|within) (\S+)(?: (?!by )(\S+/\S+))?(?: by ([\d.]+))?")


class Claim(NamedTuple):
    """What shall be true of an arm.

    Args:
        text: as it is written.
        arm: whose metric it is about.
        metric: its key.
        side: ``below``, ``above``, or ``within``.
        against: another arm, or a number.
        other: that arm's metric.
        margin: >= 0, by which it shall differ; for ``within`` > 0, by which it may.
    """

    text: str
    arm: str
    metric: str
    side: str
    against: str
    other: str
    margin: float


class Verdict(NamedTuple):
    """A claim, what was found, and in words whether that bears it out."""

    claim: Claim
    found: Contrast
    word: str


def read_claim(text: str, key: str) -> Claim:
    """``ARM METRIC below ARM (METRIC) (by NUMBER)``, ``above``, ``within``; or a number as second arm.

    Args:
        text: as it is written.
        key: what to change, for the message.

    Raises:
        InputError: it reads otherwise.

    >>> read_claim("lwf stream/forgetting below naive by 0.1", "x.yaml")[1:]
    ('lwf', 'stream/forgetting', 'below', 'naive', 'stream/forgetting', 0.1)
    """
    match = _CLAIM.fullmatch(text)
    if match is None or (match[3] == "within" and not float(match[6] or 0)):
        allowed = (
            "ARM METRIC below (above, or within) ARM (METRIC) (or a number) (by NUMBER; within needs it)"
        )
        raise InputError(got=f"Claim: {text}", allowed=allowed, key=key)
    arm, metric, side, against, other, margin = match.groups()
    return Claim(text, arm, metric, side, against, other or metric, float(margin or 0))


def judge(claim: Claim, arms: Sequence[Arm], how: Inference = Inference()) -> Verdict:  # noqa: B008
    """Hold a claim against the paired differences.

    Reproduced: the whole interval lies on the side that is named, beyond the margin (``within``: between
    minus and plus the margin). Contradicted: all of it lies elsewhere. Else it cannot be told at this scale.

    Raises:
        InputError: no such arm, or none of its runs has the metric.
    """
    named = {arm.full or arm.name: arm for arm in arms}
    ours = named[claim.arm].values(claim.metric) if claim.arm in named else {}
    if claim.against in named:
        theirs = named[claim.against].values(claim.other)
    else:
        theirs = dict.fromkeys(ours, float(claim.against)) if _is_number(claim.against) else {}
    if not ours or not theirs:
        got = f"no {claim.metric} of {claim.arm}" if not ours else f"no {claim.other} of {claim.against}"
        raise InputError(got=got, allowed=f"the arms {', '.join(named)}", key=f"Claim: {claim.text}")
    found = contrast(ours, theirs, how)
    return Verdict(claim, found, _word(claim, found))


def sentence(one: Verdict) -> str:
    """The verdict and its claim."""
    return f"{one.word}: {one.claim.text}"


def numbers(one: Contrast) -> str:
    """The mean difference, its interval, the pairs, p."""
    low, high = one.shown
    interval = "" if math.isnan(low) else f", 95% interval [{signed(low)}, {signed(high)}]"
    return f"{signed(one.mean)}{interval}, {one.pairs} pairs, p {p_text(one.p)}"


def _word(claim: Claim, found: Contrast) -> str:
    low, high = found.shown if claim.side != "below" else (-found.shown.high, -found.shown.low)
    if math.isnan(low):
        return "not to be told from one pair"
    if claim.side == "within":
        inside = -claim.margin <= low and high <= claim.margin
        outside = low > claim.margin or high < -claim.margin
    else:
        inside, outside = low > claim.margin, high < claim.margin
    return "reproduced" if inside else "contradicted" if outside else "not at this scale"


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[-+]?[\d.]+", text) is not None
