"""``report.html``: the comparison as one page that opens from a file, without network.

The page holds its numbers as JSON, a script and a style of its own, and a Content-Security-Policy that lets
only these two run and nothing be loaded. Whatever comes from outside (names of arms, streams, experiences) is
text: escaped in the page, ``<`` written as ``\\u003c`` in the JSON, set as text by the script.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Sequence
from html import escape
from importlib.resources import files as resources
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from cl_moe import files
from cl_moe.tracking.compare.match import Match
from cl_moe.tracking.compare.report_data import stream_data
from cl_moe.tracking.compare.runs import lower_is_better
from cl_moe.tracking.compare.statistics import Inference
from cl_moe.tracking.compare.table import (
    Comparison,
    Row,
    best,
    head,
    interval_text,
    interval_words,
    p_text,
    short,
    signed,
)

if TYPE_CHECKING:
    from cl_moe.tracking.compare.whole import View

_NAN = float("nan")
_HOW = """Means over the runs of an arm, ± one standard deviation; the best of a column is bold. A
difference is the mean over pairs of runs with the same seeds and order of experiences, with its {interval}.
p, two-sided: paired sign-flip permutation test; where several orders and seeds cross, that of Student's
interval over both, since runs that share an order or a seed are not independent; p Holm: adjusted for the
number of arms. Order, seed, rest: standard deviations of a two-way random-effects model."""


class Cell(NamedTuple):
    """A cell of the table: what it shows, what it is sorted by (NaN: last), whether it is the best."""

    text: str
    value: float = _NAN
    best: bool = False


def write_report(
    views: Sequence[View],
    notes: Sequence[str],
    experiment: str,
    how: Inference,
    match: Match | None,
    path: Path,
) -> Path:
    """Write the page, about 40 KB and the numbers.

    Args:
        views: a section for each.
        notes: on all of them.
        experiment: the title.
        how: intervals and p-values were made.
        match: a cost that was held equal.
        path: of the page.
    """
    style, script = (_own(f"report.{suffix}") for suffix in ("css", "js"))
    policy = f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; base-uri 'none'"
    policy += "; form-action 'none'"
    data = json.dumps({"streams": [stream_data(view) for view in views]}, allow_nan=False)
    data = data.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    said = _HOW.format(interval=interval_words([view.comparison for view in views], how))
    page = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(experiment)}: comparison</title>\n<style>{style}</style>\n</head>\n<body>",
        f"<h1>{escape(experiment)}</h1>\n<p>{escape(said)}</p>\n{_list(notes)}",
        "<noscript><p>The tables are here; curves and maps need JavaScript.</p></noscript>",
        *[_section(view, match) for view in views],
        f'<script type="application/json" id="data">{data}</script>',
        f"<script>{script}</script>\n</body>\n</html>\n",
    ]
    files.write_atomically(path, "\n".join(page).encode())
    return path


def _section(view: View, match: Match | None) -> str:
    one = view.comparison
    holders = []
    if view.left:
        holders.append(_figure("Forgetting curves", "panels", "curves", "Hover for values.", wide=True))
    holders.append(_figure("Learning against forgetting", "", "pareto", "Small: one run. Large: the mean."))
    if view.left:
        holders.append(_figure("Accuracy matrix (mean)", "matrix-arms", "matrix", "Row 0: before training."))
    if any(run.loads for run in view.left):
        said = "Load of every expert of one run, in units of an even share; more than 64: sorted, in groups."
        holders.append(_figure("Expert load", "load-arms", "loads", said))
    if any("stream/forgetting_weights" in row.metrics for row in one.rows):
        holders.append(_figure("What forgot", "", "parts", "Blue: weights. Orange: routing, new classes."))
    return "\n".join(
        [
            f"<section>\n<h2>{escape(one.stream)}</h2>\n{_list(view.notes)}",
            '<div class="controls"><input class="filter" type="search" placeholder="filter arms by words" '
            'aria-label="filter arms"><div class="chips"></div></div>',
            f'<div class="table">{_table(one, match)}</div>',
            f'<div class="charts">{"".join(holders)}</div>\n</section>',
        ]
    )


def _figure(title: str, select: str, chart: str, caption: str, wide: bool = False) -> str:
    chooser = f'<select class="{select}" aria-label="{title}: which"></select>' if select else ""
    return (
        f"<figure{' class=wide' if wide else ''}><h3>{title}</h3>{chooser}"
        f'<div class="chart {chart}"></div><figcaption>{caption}</figcaption></figure>'
    )


def _table(one: Comparison, match: Match | None) -> str:
    keys = list(one.rows[0].metrics)
    shown = [(head(key), f"{key}: {'lower' if lower_is_better(key) else 'higher'} is better") for key in keys]
    sure = [(f"difference in {head(one.metric)}", f"minus {one.baseline}"), ("interval (pairs)", "")]
    sure += [
        ("p", "sign-flip permutation test; of orders and seeds that cross, Student's"),
        ("p Holm", "adjusted for the number of arms"),
    ]
    spread = [(name, f"standard deviation of {one.metric}") for name in ("order", "seed", "rest")]
    heads = [("arm", ""), ("runs", ""), ("orders", ""), *shown[:1], *sure, *shown[1:], *spread]
    heads.append(("worst order", f"{one.metric} of the order with the worst mean"))
    if match is not None:
        heads += [(f"{head(match.key)} ratio", "to the baseline's mean; bold: within the tolerance")]
        heads += [("score at equal cost", "on all experiences; *: at the end, cheaper than the baseline")]
        heads += [("difference at equal cost", "from the baseline's end"), ("interval at equal cost", "")]
    top = "".join(
        f'<th scope="col" title="{escape(title)}"><button type="button">{escape(name)}</button></th>'
        for name, title in heads
    )
    body = "".join(_row(one, row, keys, arm, match) for arm, row in enumerate(one.rows))
    return f'<table class="rows"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>'


def _row(one: Comparison, row: Row, keys: Sequence[str], arm: int, match: Match | None) -> str:
    scores = []
    for key in keys:
        mean, std, _ = row.metrics[key]
        text = short(mean) + ("" if math.isnan(std) else f" ±{short(std)}")
        scores.append(Cell(text, mean, mean == best(one, key)))
    cells = [Cell(str(row.runs), row.runs), Cell(str(row.orders), row.orders), *scores[:1], *_sure(row)]
    cells += [*scores[1:], *_variance(row), *(_matched(row) if match is not None else [])]
    name = f'<td data-v="{escape(row.arm)}" title="{escape(row.full)}">{escape(row.arm)}</td>'
    rest = "".join(
        f'<td data-v="{"" if math.isnan(cell.value) else repr(float(cell.value))}"'
        f"{' class=best' if cell.best else ''}>{escape(cell.text)}</td>"
        for cell in cells
    )
    mark = " class=baseline" if row.arm == one.baseline else ""
    return f'<tr data-arm="{arm}"{mark}>{name}{rest}</tr>'


def _sure(row: Row) -> list[Cell]:
    """The difference, how sure it is, and p."""
    one = row.difference
    if one is None:
        return [Cell("")] * 4
    cells = [
        Cell(signed(one.mean), one.mean),
        Cell(interval_text(one.shown, one.pairs, one.few), one.shown.low),
    ]
    return [*cells, Cell(p_text(one.p), one.p), Cell(p_text(one.p_holm), one.p_holm)]


def _variance(row: Row) -> list[Cell]:
    cells = [Cell(short(part**0.5), part) for part in row.variance[:3]]
    worst = row.worst_order
    return [*cells, Cell("—") if worst is None else Cell(f"{worst[0]}: {short(worst[1])}", worst[1])]


def _matched(row: Row) -> list[Cell]:
    one = row.matched
    if one is None:
        return [Cell("—")] * 4
    low = one.interval.low
    interval = "—" if math.isnan(low) else interval_text(one.interval, one.pairs, one.few)
    score = Cell(short(one.score) + ("" if one.spent_all or not one.pairs else "*"), one.score)
    ratio = Cell(short(one.ratio), one.ratio, one.within)
    return [ratio, score, Cell(signed(one.difference), one.difference), Cell(interval, low)]


def _list(notes: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(note)}</li>' for note in notes)}</ul>" if notes else ""


def _own(name: str) -> str:
    return resources("cl_moe.tracking.compare").joinpath("page", name).read_text("utf-8")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
