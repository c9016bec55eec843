"""Arms that are made of other arms: a trend over them, the best of a curve, steps to an equal loss.

Every pair of seed and order gives a value of its own, so that a claim about it has a paired interval.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import NamedTuple

from cl_moe.errors import InputError
from cl_moe.tracking.artifacts import LEDGER, read_ledger
from cl_moe.tracking.compare import fits
from cl_moe.tracking.compare.arms import Arm
from cl_moe.tracking.compare.inside import folder_of, inside_curve, trade_curve
from cl_moe.tracking.compare.runs import SEEDS, Pair, Run

CURVES: dict[str, Callable[[Sequence[float], Sequence[float]], fits.Fit]] = {
    "slope": fits.slope,
    "parabola": fits.parabola,
    "power": fits.power,
}
_WORD = r"(?P<{}>\S+)".format
_FORMS = tuple(
    re.compile(f"{_WORD('name')} = {form}")
    for form in (
        f"(?P<kind>{'|'.join(CURVES)}) {_WORD('metric')} over {_WORD('over')} of {_WORD('arms')}",
        f"(?P<kind>reach|match) {_WORD('base')} by {_WORD('arms')}",
        f"(?P<kind>kept) {_WORD('metric')} of {_WORD('arms')} from {_WORD('base')} to {_WORD('high')}",
        f"(?P<kind>ratio) {_WORD('metric')} of {_WORD('arms')} to {_WORD('base')}",
        f"(?P<kind>change) {_WORD('metric')} of {_WORD('arms')}",
        f"(?P<kind>births) of {_WORD('arms')} at {_WORD('at')}",
    )
)


class Derived(NamedTuple):
    """How an arm is made of others.

    Args:
        text: as it is written.
        name: of the new arm.
        kind: of what.
        words: the rest of the text, by name.
    """

    text: str
    name: str
    kind: str
    words: Mapping[str, str]


class Family(NamedTuple):
    """A curve through arms, for a figure.

    Args:
        name: of the derived arm.
        metric: the y axis.
        over: the x axis.
        points: (x, y) of every run.
        curve: through the means of the arms.
    """

    name: str
    metric: str
    over: str
    points: list[tuple[float, float]]
    curve: fits.Fit


def read_derived(text: str, key: str) -> Derived:
    """A line that makes an arm; its values are called ``derived/...``.

    - ``NAME = slope METRIC over X of ARMS`` (or ``parabola``, ``power``): a curve through arms, ``ARMS``
      names with commas between, ``*`` for any letters; X a metric, or a key of the configuration. Values:
      those of the fit (``derived/slope``; ``derived/best``, ``derived/at``; ``derived/exponent``, ...).
    - ``NAME = reach BASE by ARM``: what share of BASE's steps, operations, seconds ARM takes to the lowest
      loss that BASE reaches, by the evaluations inside experiences (``eval.every``):
      ``derived/share_of_steps``, ``_flops``, ``_seconds``. An arm that never reaches it is given all that it
      spent, which is too little.
    - ``NAME = match BASE by ARM``: what ARM has forgotten when it has learned as much of the last experience
      as BASE has at its end, by the same evaluations: ``derived/older``, the mean loss on older experiences,
      and ``derived/older_of_base``. A pair in which ARM never learns as much is left out.
    - ``NAME = kept METRIC of ARM from BASE to HIGH``: the share of the way between two arms,
      ``derived/share``.
    - ``NAME = ratio METRIC of ARM to BASE``: ``derived/ratio``.
    - ``NAME = change METRIC of ARM``: METRIC/experience_NN, the mean over the last fifth of the experiences
      minus that over the first fifth, ``derived/change``.
    - ``NAME = births of ARM at 4,8``: before which experiences experts were born, held against those where
      something changes: ``derived/missed``, ``derived/false``, ``derived/births``.

    Raises:
        InputError: it reads otherwise.
    """
    for form in _FORMS:
        if match := form.fullmatch(text):
            words = match.groupdict()
            return Derived(text, words.pop("name"), words.pop("kind"), words)
    allowed = "one of the forms of cl_moe.tracking.compare.families.read_derived"
    raise InputError(got=f"Derive: {text}", allowed=allowed, key=key)


def derive(one: Derived, arms: Sequence[Arm]) -> Arm:
    """The arm: a run for every pair of which nothing lacks.

    Raises:
        InputError: no such arm, or no pair is whole.
    """
    make: dict[str, Callable[[Derived, Sequence[Arm]], dict[Pair, dict[str, float]]]] = {
        "reach": partial(_beside_base, values=_shares),
        "match": partial(_beside_base, values=_older),
        "kept": _between,
        "ratio": _between,
        "change": _change,
        "births": _births,
    }
    found = make.get(one.kind, _fitted)(one, arms)
    if not found:
        raise InputError(got="no seed and order that all of them have", allowed="paired runs", key=one.text)
    runs = []
    for pair, values in found.items():
        metrics = {f"derived/{name}": value for name, value in values.items() if math.isfinite(value)}
        runs.append(Run(f"{one.name} {pair}", 0, _about(one.name, pair), metrics))
    return Arm(one.name, runs, (), one.name)


def family(one: Derived, arms: Sequence[Arm]) -> Family | None:
    """The curve to draw; None if it is another kind."""
    if one.kind not in CURVES:
        return None
    members, metric, over = chosen(one, arms), one.words["metric"], one.words["over"]
    places = [
        [(_place(r, over, one), r.metrics[metric]) for r in a.runs if metric in r.metrics] for a in members
    ]
    means = [
        tuple(sum(axis) / len(axis) for axis in zip(*points, strict=True)) for points in places if points
    ]
    curve = CURVES[one.kind]([x for x, _ in means], [y for _, y in means])
    return Family(one.name, metric, over, [point for points in places for point in points], curve)


def chosen(one: Derived, arms: Sequence[Arm]) -> list[Arm]:
    """The arms that its words name.

    Raises:
        InputError: a pattern that none matches.
    """
    found: dict[str, Arm] = {}
    for pattern in one.words["arms"].split(","):
        matches = {name: arm for arm in arms if fnmatchcase(name := arm.full or arm.name, pattern)}
        if not matches:
            names = ", ".join(arm.full or arm.name for arm in arms)
            raise InputError(got=f"no arm {pattern}", allowed=names, key=f"Derive: {one.text}")
        found |= matches
    return list(found.values())


def _fitted(one: Derived, arms: Sequence[Arm]) -> dict[Pair, dict[str, float]]:
    metric, over = one.words["metric"], one.words["over"]
    points: dict[Pair, list[tuple[float, float]]] = {}
    members = chosen(one, arms)
    for arm in members:
        for run in arm.runs:
            if metric in run.metrics:
                points.setdefault(run.pair(()), []).append((_place(run, over, one), run.metrics[metric]))
    whole = {pair: found for pair, found in points.items() if len(found) == len(members)}
    fit = CURVES[one.kind]
    return {pair: fit([x for x, _ in found], [y for _, y in found]).values for pair, found in whole.items()}


def _beside_base(
    one: Derived, arms: Sequence[Arm], values: Callable[[Run, Run], dict[str, float]]
) -> dict[Pair, dict[str, float]]:
    (base,) = chosen(one._replace(words={"arms": one.words["base"]}), arms)
    (arm,) = chosen(one, arms)
    bases = {run.pair(()): run for run in base.runs}
    found = {run.pair(()): values(run, bases[run.pair(())]) for run in arm.runs if run.pair(()) in bases}
    return {pair: named for pair, named in found.items() if named}


def _shares(run: Run, base: Run) -> dict[str, float]:
    steps, losses = inside_curve(run)
    base_steps, base_losses = inside_curve(base)
    level = min(base_losses)
    needed = fits.first_reaching(base_steps, base_losses, level)
    assert needed is not None
    share = (fits.first_reaching(steps, losses, level) or steps[-1]) / needed
    shares = {"share_of_steps": share}
    for name, key in (("flops", "cost/train_flops"), ("seconds", "cost/seconds")):
        per_step = [one.metrics[key] / last for one, last in ((run, steps[-1]), (base, base_steps[-1]))]
        shares[f"share_of_{name}"] = share * per_step[0] / per_step[1]
    return shares


def _older(run: Run, base: Run) -> dict[str, float]:
    newest, older = trade_curve(run)
    base_newest, base_older = trade_curve(base)
    place = fits.first_reaching(older, newest, base_newest[-1])
    return {} if place is None else {"older": place, "older_of_base": base_older[-1]}


def _between(one: Derived, arms: Sequence[Arm]) -> dict[Pair, dict[str, float]]:
    """A share of the way, or a ratio."""
    ours, base = (_values(one, arms, word) for word in ("arms", "base"))
    if one.kind == "ratio":
        return {pair: {"ratio": value / base[pair]} for pair, value in ours.items() if base.get(pair)}
    high = _values(one, arms, "high")
    return {
        pair: {"share": (value - base[pair]) / (high[pair] - base[pair])}
        for pair, value in ours.items()
        if pair in base and pair in high and high[pair] != base[pair]
    }


def _change(one: Derived, arms: Sequence[Arm]) -> dict[Pair, dict[str, float]]:
    """Late minus early."""
    (arm,) = chosen(one, arms)
    found = {}
    for run in arm.runs:
        prefix = f"{one.words['metric']}/experience_"
        values = [value for key, value in sorted(run.metrics.items()) if key.startswith(prefix)]
        if fifth := len(values) // 5:
            found[run.pair(())] = {"change": (sum(values[-fifth:]) - sum(values[:fifth])) / fifth}
    return found


def _births(one: Derived, arms: Sequence[Arm]) -> dict[Pair, dict[str, float]]:
    """Births against boundaries, by the ledgers."""
    (arm,) = chosen(one, arms)
    asked = {int(number) for number in one.words["at"].split(",")}
    found = {}
    for run in arm.runs:
        ledger = read_ledger(folder_of(run) / LEDGER)
        born = {int(event["experience"]) for event in ledger if event["act"] == "grow"}
        counts = {"missed": asked - born, "false": born - asked, "births": born}
        found[run.pair(())] = {name: float(len(places)) for name, places in counts.items()}
    return found


def _values(one: Derived, arms: Sequence[Arm], word: str) -> dict[Pair, float]:
    (arm,) = chosen(one._replace(words={"arms": one.words[word]}), arms)
    return arm.values(one.words["metric"])


def _place(run: Run, over: str, one: Derived) -> float:
    """A run's place on the x axis."""
    if over in run.metrics:
        return run.metrics[over]
    try:
        return float(run.about[over])
    except (KeyError, ValueError):
        got = f"{over} of {run.about.get('arm', run.run_id)}: {run.about.get(over, 'nothing')}"
        raise InputError(got=got, allowed="a metric or a number", key=f"Derive: {one.text}") from None


def _about(name: str, pair: Pair) -> dict[str, str]:
    values = (pair.seed[0], pair.order, pair.seed[1])
    return {"arm": name, **dict(zip(SEEDS, values, strict=True))}
