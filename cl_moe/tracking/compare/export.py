"""The comparison for other programs: ``summary.csv`` in full precision, ``summary.tex`` for a paper."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path

from cl_moe import files
from cl_moe.tracking.compare.runs import lower_is_better
from cl_moe.tracking.compare.statistics import Contrast, Inference, Interval, Spread
from cl_moe.tracking.compare.table import Comparison, Row, best, head, interval_words, p_text, short, signed

_NAN = float("nan")
_NO_SPREAD = Spread(_NAN, _NAN, 0)
_NO_INTERVAL = Interval(_NAN, _NAN)
_NO_CONTRAST = Contrast(_NAN, 0, _NO_INTERVAL, _NO_INTERVAL, _NO_INTERVAL, _NAN, _NAN)
_DIFFERENCE = [f"difference/{part}" for part in ("mean", "low", "high", "pairs")]
_DIFFERENCE += [f"difference/{end}_{side}" for end in ("bootstrap", "t") for side in ("low", "high")]
_DIFFERENCE += ["difference/p", "difference/p_holm"]
_VARIANCE = [f"variance/{part}" for part in ("order", "seed", "rest", "clipped")]
_WORST = ["worst_order", "worst_order/mean"]
_MATCH = [f"match/{part}" for part in ("cost", "ratio", "within", "score", "spent_all", "pairs")]
_MATCH += [f"match/difference_{part}" for part in ("mean", "low", "high")]
_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%",
    "_": r"\_", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "<": r"\textless{}",
    ">": r"\textgreater{}", "±": r"$\pm$", "—": "--", "…": r"\ldots{}", "\n": " ",
}  # fmt: skip


def write_csv(comparisons: Sequence[Comparison], path: Path) -> Path:
    """A line per stream and arm; full precision; an empty cell is undefined.

    ``difference/low`` and ``high`` are the interval that tables show; both kinds stand behind. Names that a
    spreadsheet would take for a formula begin with an apostrophe.
    """
    keys = list(dict.fromkeys(key for one in comparisons for key in one.rows[0].metrics))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    spreads = [f"{key}/{part}" for key in keys for part in ("mean", "std", "count")]
    first = ["stream", "arm", "runs", "seeds", "orders", *spreads, "metric", "baseline"]
    writer.writerow([*first, *_DIFFERENCE, *_VARIANCE, *_WORST, *_MATCH])
    for one in comparisons:
        for row in one.rows:
            values = [value for key in keys for value in row.metrics.get(key, _NO_SPREAD)]
            cells = [*map(_exact, values), one.metric, _plain(one.baseline or ""), *_difference(row)]
            worst = row.worst_order or ("", _NAN)
            cells += [*map(_exact, row.variance[:3]), " ".join(row.variance.clipped)]
            cells += [_plain(worst[0]), _exact(worst[1]), *_matched(row)]
            writer.writerow([_plain(one.stream), _plain(row.full), row.runs, row.seeds, row.orders, *cells])
    files.write_atomically(path, text.getvalue().encode())
    return path


def write_latex(comparisons: Sequence[Comparison], how: Inference, path: Path) -> Path:
    """A ``tabular`` per stream, to be ``\\input``; rules of booktabs where it is loaded, plain ones else."""
    rules = "".join(rf"\providecommand{{\{name}}}{{\hline}}" for name in ("toprule", "midrule", "bottomrule"))
    tables = "\n\n".join(_tabular(one, how) for one in comparisons)
    files.write_atomically(path, f"{rules}\n\n{tables}\n".encode())
    return path


def latex(text: str) -> str:
    r"""Text that LaTeX prints as it is.

    >>> print(latex("lwf_2 & 5% <b>"))
    lwf\_2 \& 5\% \textless{}b\textgreater{}
    """
    return "".join(_LATEX.get(letter, letter) for letter in text)


def _tabular(one: Comparison, how: Inference) -> str:
    keys = [key for key in one.rows[0].metrics if not key.startswith(("cost/", "experts/"))]
    against = latex(one.baseline or "the baseline")
    heads = ["arm", "$n$", *(f"{latex(head(key))} ${_arrow(key)}$" for key in keys)]
    heads += [f"difference from {against}", "$p$ (Holm)"]
    rows = [" & ".join(_cells(one, row, keys)) + r" \\" for row in one.rows]
    about = f"% {one.stream}: mean ± standard deviation over n runs; difference in {one.metric} with its "
    about += (
        f"{interval_words([one], how)} and the number of pairs; p of the sign-flip test, Student's where "
    )
    about += "orders and seeds cross, Holm over arms."
    return "\n".join(
        [
            about.replace("\n", " "),
            rf"\begin{{tabular}}{{lr{'r' * (len(keys) + 2)}}}",
            r"\toprule",
            " & ".join(heads) + r" \\",
            r"\midrule",
            *rows,
            r"\bottomrule",
            r"\end{tabular}",
        ]
    )


def _cells(one: Comparison, row: Row, keys: Sequence[str]) -> list[str]:
    cells = [latex(row.arm), str(row.runs)]
    for key in keys:
        mean, std, _ = row.metrics[key]
        text = latex(short(mean)) if math.isnan(mean) else _number(short(mean))
        text = (
            _number(rf"\mathbf{{{short(mean)}}}") if mean == best(one, key) else text
        )  # \textbf is not math
        cells.append(text + ("" if math.isnan(std) else rf" $\pm$ {_number(short(std))}"))
    if row.difference is None or row.difference.pairs == 0:
        return [*cells, "--", "--"]
    low, high = row.difference.shown
    pairs = row.difference.pairs
    weak = r"$\sim$" if row.difference.few else ""
    interval = "" if pairs < 2 else f" {weak}[{_number(signed(low))}, {_number(signed(high))}]"
    return [*cells, f"{_number(signed(row.difference.mean))}{interval} ({pairs})", _p(row.difference.p_holm)]


def _number(text: str) -> str:
    return f"${text}$"


def _p(p: float) -> str:
    return f"${p_text(p)}$"


def _arrow(key: str) -> str:
    return r"\downarrow" if lower_is_better(key) else r"\uparrow"


def _difference(row: Row) -> list[str]:
    one = row.difference or _NO_CONTRAST
    numbers = [one.mean, *one.shown, one.pairs, *one.bootstrap, *one.student, one.p, one.p_holm]
    return [_exact(number) for number in numbers]


def _matched(row: Row) -> list[str]:
    one = row.matched
    if one is None:
        return [""] * len(_MATCH)
    numbers = [one.cost, one.ratio, float(one.within), one.score, float(one.spent_all), float(one.pairs)]
    return [_exact(number) for number in (*numbers, one.difference, *one.interval)]


def _plain(name: str) -> str:
    """A name that no spreadsheet runs.

    >>> _plain("=1+1"), _plain("lwf"), _plain("-")
    ("'=1+1", 'lwf', '-')
    """
    return f"'{name}" if len(name) > 1 and name[0] in "=+-@\t\r" else name


def _exact(value: float) -> str:
    return "" if math.isnan(value) else repr(value)
