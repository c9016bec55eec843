"""The comparison as rows of numbers, and the terminal's view of them, within 100 columns."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from cl_moe.tracking.compare.arms import Arm, kind_of
from cl_moe.tracking.compare.runs import ACCURACY, LOSS, lower_is_better
from cl_moe.tracking.compare.statistics import (
    FEW_PAIRS,
    Contrast,
    Inference,
    Interval,
    Spread,
    contrast,
    holm,
)
from cl_moe.tracking.compare.variance import Components, components, worst_order

if TYPE_CHECKING:
    from rich.table import Table

    from cl_moe.tracking.compare.match import Matched

_SCORES = ("stream/forgetting", "stream/backward_transfer", "stream/forward_transfer")
_PARTS = ("stream/forgetting_weights", "stream/forgetting_routing")
_COSTS = ("experts/usage", "experts/unevenness", "cost/seconds", "cost/train_flops", "cost/params_total")
_MORE_COSTS = ("cost/params_active", "cost/peak_memory_bytes", "cost/buffer_bytes")
_HEADS = {
    ACCURACY: "accuracy",
    LOSS: "loss",
    "stream/backward_transfer": "backward",
    "stream/forward_transfer": "forward",
    "stream/forgetting_weights": "by weights",
    "stream/forgetting_routing": "by routing, classes",
    "cost/params_total": "params",
    "cost/params_active": "active",
    "cost/train_flops": "FLOPs",
    "cost/peak_memory_bytes": "peak bytes",
    "cost/buffer_bytes": "buffer bytes",
}


class Row(NamedTuple):
    """One arm of a table.

    Args:
        arm: its name as shown.
        full: its name in MLflow.
        runs: how many count.
        seeds: distinct pairs of init and data seed.
        orders: distinct orders.
        metrics: each metric's spread over the pairs.
        difference: of the main metric from the baseline; None for the baseline and without one.
        variance: of the main metric, by order and seed.
        worst_order: the order with the worst mean of the main metric, and that mean.
        matched: the arm at the baseline's cost, where that was asked for.
    """

    arm: str
    full: str
    runs: int
    seeds: int
    orders: int
    metrics: dict[str, Spread]
    difference: Contrast | None
    variance: Components
    worst_order: tuple[str, float] | None
    matched: Matched | None = None


class Comparison(NamedTuple):
    """All arms of one stream; the baseline is None where the stream lacks the arm that was asked for."""

    stream: str
    metric: str
    baseline: str | None
    rows: list[Row]
    common: str = ""
    """What all arms' names in MLflow have, and the names here leave out."""


def main_metric(arms: Sequence[Arm]) -> str:
    """Average accuracy, or average loss where that is what the runs measured."""
    from cl_moe.stream import is_loss

    return LOSS if is_loss(kind_of(arms)) else ACCURACY


def compare_arms(
    stream: str,
    arms: Sequence[Arm],
    baseline: Arm | None,
    metric: str | None,
    how: Inference = Inference(),  # noqa: B008  (immutable)
) -> Comparison:
    """The rows of one stream's table, the baseline's first; p-values adjusted over its arms."""
    main = metric or main_metric(arms)
    keys = list(dict.fromkeys((main, main_metric(arms), *_SCORES, *_PARTS, *_COSTS, *_MORE_COSTS)))
    keys = [key for key in keys if any(key in run.metrics for arm in arms for run in arm.runs)]
    arms = sorted(arms, key=lambda arm: baseline is None or arm.name != baseline.name)
    values = {arm.name: arm.values(main) for arm in arms}
    contrasts = [
        contrast(values[arm.name], values[baseline.name], how)
        for arm in arms
        if baseline is not None and arm.name != baseline.name
    ]
    adjusted = holm([one.p for one in contrasts])
    judged = iter([one._replace(p_holm=p) for one, p in zip(contrasts, adjusted, strict=True)])
    rows = [
        Row(
            arm.name,
            arm.full or arm.name,
            len(arm.runs),
            arm.num_seeds,
            arm.num_orders,
            {key: arm.spread(key) for key in keys},
            None if baseline is None or arm.name == baseline.name else next(judged),
            components(values[arm.name]),
            worst_order(values[arm.name], lower_is_better(main)),
        )
        for arm in arms
    ]
    return Comparison(stream, main, baseline.name if baseline else None, rows)


def score_table(one: Comparison) -> Table:
    """Scores, forgetting and transfers: mean ± standard deviation; the best mean of a column is bold."""
    keys = [key for key in one.rows[0].metrics if not key.startswith(("cost/", "experts/"))]
    width = min(max(len(row.arm) for row in one.rows), 18)  # else so many columns break words of names
    table = table_of(f"{one.stream}: mean ± std over seeds x orders", width)
    table.add_column("runs", justify="right")
    return _fill(table, one, keys[:6], lambda row: [f"{row.seeds}x{row.orders}"], _plus_minus)


def difference_table(one: Comparison) -> Table:
    """The difference from the baseline, its interval, and p by itself and among so many arms."""
    better = "lower" if lower_is_better(one.metric) else "higher"
    against = f"minus that of {one.baseline}" if one.baseline else "(the baseline has no run here)"
    table = table_of(f"{head(one.metric)} ({better} is better) {against}")
    for name in ("difference", "interval (pairs)", "p", "p Holm"):
        table.add_column(name, justify="right")
    return _fill(table, one, [], _difference, _plus_minus)


def variance_table(one: Comparison) -> Table:
    """Where the spread of the main metric comes from, as standard deviations, and the worst order."""
    table = table_of(f"{head(one.metric)}: standard deviation between orders, between seeds, and the rest")
    for name in ("order", "seed", "rest", "worst order: mean"):
        table.add_column(name, justify="right")
    return _fill(table, one, [], _variance, _plus_minus)


def cost_table(one: Comparison) -> Table:
    """Experts' load and cost, means only; what has no room here is in the files."""
    keys = [key for key in one.rows[0].metrics if key in (*_COSTS, *_MORE_COSTS[1:])]
    return _fill(table_of("experts and cost"), one, keys, lambda row: [], lambda spread: short(spread.mean))


def head(key: str) -> str:
    """The column head of a metric.

    >>> head("stream/average_accuracy"), head("cost/seconds")
    ('accuracy', 'seconds')
    """
    return _HEADS.get(key, key.rsplit("/", 1)[-1])


def short(value: float) -> str:
    """At most six characters for what is usual; an em dash for what is undefined.

    >>> short(0.73751), short(-0.0167), short(12.345), short(1234567), short(float("nan"))
    ('0.738', '-0.017', '12.3', '1.23M', '—')
    >>> short(-0.0001), short(9.9999), short(999.96), short(999_999.0), short(0)  # no "-0.000", no "1e+03k"
    ('0.000', '10.0', '1000', '1M', '0')
    """
    if math.isnan(value):
        return "—"
    if abs(value) >= 1e4:
        value = float(f"{value:.3g}")  # before the unit is chosen: it may round into the next
    if abs(value) >= 1e12:
        return f"{value:.2e}".replace("e+", "e")
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / limit * (10 if letter == 'k' else 1):.3g}{letter}"
    if value == 0 or abs(value) >= 999.95 or (float(value).is_integer() and abs(value) >= 10):
        return f"{abs(value) if value == 0 else value:.0f}"
    # Rounded first, and a negative zero is none.
    return f"{round(value, 3) + 0.0:.3f}" if abs(value) < 9.9995 else f"{value:.1f}"


def signed(value: float) -> str:
    """``short`` with a sign."""
    return ("" if value < 0 or math.isnan(value) else "+") + short(value)


def p_text(p: float) -> str:
    """A p-value with as much as it says.

    >>> p_text(0.25), p_text(0.03125), p_text(1e-4), p_text(float("nan"))
    ('.25', '.031', '<.001', '—')
    """
    if math.isnan(p):
        return "—"
    return "<.001" if p < 0.001 else f"{p:.2g}".removeprefix("0")


def interval_text(interval: Interval, pairs: int, few: bool) -> str:
    """The interval and the number of pairs; ``~``: Student's, since there are too few for a bootstrap.

    >>> interval_text(Interval(-0.5, 1.0), 3, True), interval_text(Interval(0.5, 1.0), 9, False)
    ('~[-0.500, +1.000] (3)', '[+0.500, +1.000] (9)')
    """
    if pairs == 0:
        return "no pairs"
    if pairs == 1:
        return "(1)"
    return f"{'~' if few else ''}[{signed(interval.low)}, {signed(interval.high)}] ({pairs})"


def interval_words(comparisons: Sequence[Comparison], how: Inference) -> str:
    """Which intervals tables of these show, at which level; resamples where there is a bootstrap.

    >>> interval_words([], Inference(confidence=0.9))
    "90% interval (Student's, of the means of orders and seeds)"
    """
    rows = [row.difference for one in comparisons for row in one.rows if row.difference is not None]
    shown = [one for one in rows if one.pairs > 1]
    words = "Student's, of the means of orders and seeds"
    few = any(one.few for one in shown)
    mark = f"~: fewer than {FEW_PAIRS} pairs, orders or seeds"
    if any(one.resampled for one in shown):
        resamples = f"bootstrap over orders and seeds, {how.resamples:,} resamples"
        words = f"{resamples}; {mark}, {words}" if few else resamples
    elif few:
        words += f"; {mark}"
    return f"{100 * how.confidence:g}% interval ({words})"


def best(one: Comparison, key: str) -> float | None:
    """The best mean of a metric among the arms; None where they do not differ."""
    means = [row.metrics[key].mean for row in one.rows if not math.isnan(row.metrics[key].mean)]
    if len(set(means)) < 2:
        return None
    return min(means) if lower_is_better(key) else max(means)


def table_of(title: str, width: int | None = None) -> Table:
    """An empty table with a column for the arm, of this width, or of what the others leave."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False
    )
    table.add_column("arm", overflow="fold", min_width=10, width=width)
    return table


def _plus_minus(spread: Spread) -> str:
    return short(spread.mean) + (f" ±{short(spread.std)}" if not math.isnan(spread.std) else "")


def _difference(row: Row) -> list[str]:
    one = row.difference
    if one is None:
        return [""] * 4
    return [signed(one.mean), interval_text(one.shown, one.pairs, one.few), p_text(one.p), p_text(one.p_holm)]


def _variance(row: Row) -> list[str]:
    worst = f"{row.worst_order[0]}: {short(row.worst_order[1])}" if row.worst_order else "—"
    return [*(short(part**0.5) for part in row.variance[:3]), worst]


def _fill(
    table: Table,
    one: Comparison,
    keys: Sequence[str],
    first: Callable[[Row], list[str]],
    show: Callable[[Spread], str],
) -> Table:
    from rich.text import Text

    bests = {key: best(one, key) for key in keys}
    for key in keys:
        table.add_column(head(key), justify="right")
    for row in one.rows:
        cells = [
            Text(show(row.metrics[key]), style="bold" if row.metrics[key].mean == bests[key] else "")
            for key in keys
        ]
        table.add_row(Text(row.arm), *map(Text, first(row)), *cells)
    return table
