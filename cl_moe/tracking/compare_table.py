"""The comparison as a table: rows of numbers, their CSV, and the terminal's view of them."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from cl_moe.tracking.compare_runs import Arm, lower_is_better
from cl_moe.tracking.compare_statistics import Difference, Spread

if TYPE_CHECKING:
    from rich.table import Table

ACCURACY, LOSS = "stream/average_accuracy", "stream/average_loss"
_SCORES = ("stream/forgetting", "stream/backward_transfer", "stream/forward_transfer")
_COSTS = ("experts/usage", "experts/unevenness", "cost/seconds", "cost/params_total")
_HEADS = {
    ACCURACY: "accuracy",
    LOSS: "loss",
    "stream/backward_transfer": "backward",
    "stream/forward_transfer": "forward",
    "cost/params_total": "params",
}


class Row(NamedTuple):
    """One arm: how many runs, seeds and orders; each metric's spread; the main metric's difference."""

    arm: str
    runs: int
    seeds: int
    orders: int
    metrics: dict[str, Spread]
    difference: Difference | None


class Comparison(NamedTuple):
    """All arms of one stream; the baseline is None where the stream lacks the arm that was asked for."""

    stream: str
    metric: str
    baseline: str | None
    rows: list[Row]


def main_metric(arms: Sequence[Arm]) -> str:
    """Average accuracy, or average loss where that is what the runs measured."""
    return LOSS if is_language(arms) else ACCURACY


def is_language(arms: Sequence[Arm]) -> bool:
    """Whether the runs are of language models, which have losses and no accuracies."""
    return any(LOSS in run.metrics for arm in arms for run in arm.runs)


def compare_arms(stream: str, arms: Sequence[Arm], baseline: Arm | None, metric: str | None) -> Comparison:
    """The rows of one stream's table, the baseline's first."""
    main = metric or main_metric(arms)
    keys = list(dict.fromkeys((main, main_metric(arms), *_SCORES, *_COSTS)))
    keys = [key for key in keys if any(key in run.metrics for arm in arms for run in arm.runs)]
    rows = [
        Row(
            arm.name,
            len(arm.runs),
            arm.num_seeds,
            arm.num_orders,
            {key: arm.spread(key) for key in keys},
            arm.against(baseline, main) if baseline is not None and arm is not baseline else None,
        )
        for arm in sorted(arms, key=lambda arm: arm is not baseline)
    ]
    return Comparison(stream, main, baseline.name if baseline else None, rows)


def write_csv(comparisons: Sequence[Comparison], path: Path) -> None:
    """A line per stream and arm; full precision; an empty cell is undefined."""
    keys = list(dict.fromkeys(key for one in comparisons for key in one.rows[0].metrics))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    spreads = [f"{key}/{part}" for key in keys for part in ("mean", "std", "count")]
    difference = [f"difference/{part}" for part in ("mean", "low", "high", "pairs")]
    writer.writerow(["stream", "arm", "runs", "seeds", "orders", *spreads, "metric", "baseline", *difference])
    nothing = Spread(math.nan, math.nan, 0)
    for one in comparisons:
        for row in one.rows:
            values = [value for key in keys for value in row.metrics.get(key, nothing)]
            ours = row.difference or Difference(math.nan, math.nan, math.nan, 0)
            cells = [*map(_exact, values), one.metric, one.baseline or "", *map(_exact, ours)]
            writer.writerow([one.stream, row.arm, row.runs, row.seeds, row.orders, *cells])
    path.write_text(text.getvalue(), encoding="utf-8")


def score_table(one: Comparison) -> Table:
    """Scores, forgetting and transfers: mean ± standard deviation; the best mean of a column is bold."""
    keys = [key for key in one.rows[0].metrics if key not in _COSTS]
    table = _table(f"{one.stream}: mean ± std over seeds x orders")
    table.add_column("runs", justify="right")
    return _fill(table, one, keys, lambda row: [f"{row.seeds}x{row.orders}"], _plus_minus)


def cost_table(one: Comparison) -> Table:
    """The difference from the baseline with its interval; experts' load and cost, means only."""
    keys = [key for key in one.rows[0].metrics if key in _COSTS]
    better = "lower" if lower_is_better(one.metric) else "higher"
    against = f"minus that of {one.baseline}" if one.baseline else "(the baseline has no run here)"
    table = _table(f"{head(one.metric)} ({better} is better) {against}; experts; cost")
    table.add_column("difference", justify="right")
    table.add_column("95% interval (pairs)", justify="right")
    return _fill(table, one, keys, _difference, lambda spread: short(spread.mean))


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
    """
    if math.isnan(value):
        return "—"
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / limit * (10 if letter == 'k' else 1):.3g}{letter}"
    if float(value).is_integer() and abs(value) >= 10:
        return f"{value:.0f}"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def _plus_minus(spread: Spread) -> str:
    return short(spread.mean) + (f" ±{short(spread.std)}" if not math.isnan(spread.std) else "")


def _difference(row: Row) -> list[str]:
    if row.difference is None:
        return ["", ""]
    mean, low, high, pairs = row.difference
    if pairs == 0:
        return ["—", "no common seeds"]
    interval = f"[{_signed(low)}, {_signed(high)}] ({pairs})" if pairs > 1 else "(1)"
    return [_signed(mean), interval]


def _signed(value: float) -> str:
    return ("" if value < 0 else "+") + short(value)


def _exact(value: float) -> str:
    return "" if math.isnan(value) else repr(value)


def _table(title: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("arm", overflow="fold", min_width=10)
    return table


def _fill(
    table: Table,
    one: Comparison,
    keys: Sequence[str],
    first: Callable[[Row], list[str]],
    show: Callable[[Spread], str],
) -> Table:
    from rich.text import Text

    best = {key: _best(one, key) for key in keys}
    for key in keys:
        table.add_column(head(key), justify="right")
    for row in one.rows:
        cells = [
            Text(show(row.metrics[key]), style="bold" if row.metrics[key].mean == best[key] else "")
            for key in keys
        ]
        table.add_row(Text(row.arm), *map(Text, first(row)), *cells)
    return table


def _best(one: Comparison, key: str) -> float | None:
    means = [row.metrics[key].mean for row in one.rows if not math.isnan(row.metrics[key].mean)]
    if len(means) < 2:
        return None
    return min(means) if lower_is_better(key) else max(means)
