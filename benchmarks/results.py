"""The named experiments that make a claim: run where they are not done yet, judged, written up.

An experiment of ``conf/experiment`` takes part if its first lines have a ``Claim``:

    # Question: does a little replay keep more than plain fine-tuning?
    # Source:   where the claim stands
    # Command:  cl-moe -m experiment=NAME strategy=naive,replay seed.init=0,1,2 'seed.data=${seed.init}'
    # Run time: 2 minutes on 2 cores
    # Full scale: the overrides with which it is the source's own experiment
    # Claim:    replay stream/forgetting below naive
    # Figure:   pareto

A claim is an arm, a metric, ``below`` or ``above``, and another arm (with a metric of its own behind it, if
that is another one) or a number, perhaps ``by`` a margin; there may be several. It is reproduced if the whole
95% interval of the paired difference lies on the side that it names, beyond the margin, contradicted if all
of it lies on the other side, and else not to be told at this scale. ``Figure`` is one of the comparison's, or
``stability_gap`` of the first claim's arm. Lines go on behind three spaces, commands behind ``&&``.

Runs are kept in ``results/``, with an MLflow store of their own. Finished ones are not run again, and those
that were stopped go on. A section between two marks of ``docs/RESULTS.md`` is written anew; all else there
stays as it is.

    python benchmarks/results.py [NAME ...]
"""

from __future__ import annotations

import math
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from cl_moe.errors import InputError
from cl_moe.tracking import compare
from cl_moe.tracking.compare.arms import Arm, by_stream
from cl_moe.tracking.compare.runs import read_runs
from cl_moe.tracking.compare.statistics import Contrast, Inference, contrast
from cl_moe.tracking.compare.table import head, main_metric, p_text, short, signed
from cl_moe.tracking.store import open_store

ROOT = Path(__file__).resolve().parents[1]
FIGURES = (
    "forgetting_curves",
    "accuracy_matrix",
    "expert_load",
    "pareto",
    "forgetting_parts",
    "stability_gap",
)
FIELDS = ("Question", "Source", "Command", "Run time", "Full scale", "Claim", "Figure")
_NEEDED = ("Question", "Source", "Command", "Run time", "Full scale")
_FIELD = re.compile(rf"# ({'|'.join(FIELDS)}): +(.*)")
_CLAIM = re.compile(r"(\S+) (\S+) (below|above) (\S+)(?: (?!by )(\S+/\S+))?(?: by ([\d.]+))?")
WIDTH = 1100  # pixels of a figure


class Claim(NamedTuple):
    """What shall be true of an arm.

    Args:
        text: as it is written.
        arm: whose metric it is about.
        metric: its key.
        side: ``below`` or ``above``.
        against: another arm, or a number.
        other: that arm's metric.
        margin: >= 0, by which it shall differ.
    """

    text: str
    arm: str
    metric: str
    side: str
    against: str
    other: str
    margin: float


class Named(NamedTuple):
    """An experiment as its file describes it: every field's text, and its claims."""

    name: str
    about: Mapping[str, str]
    claims: tuple[Claim, ...]


class Verdict(NamedTuple):
    """A claim, what was found, and in words whether that bears it out."""

    claim: Claim
    found: Contrast
    word: str


def read(path: Path) -> Named | None:
    """The description at the top of an experiment's file; None if it claims nothing.

    Raises:
        InputError: a claim that cannot be read, or a field is missing beside it.
    """
    about: dict[str, str] = {}
    claims: list[str] = []
    field = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if match := _FIELD.match(line):
            field, text = match[1], match[2].strip()
            if field == "Claim":
                claims.append(text)
            about[field] = text
        elif field and line.startswith("#   "):
            about[field] += f" {line[1:].strip()}"
    if not claims:
        return None
    if missing := [field for field in _NEEDED if field not in about]:
        raise InputError(got=f"{path.name} without {missing[0]}", allowed=", ".join(_NEEDED), key=path.name)
    figure = about.setdefault("Figure", FIGURES[0])
    if figure not in FIGURES:
        raise InputError(got=f"Figure: {figure}", allowed=", ".join(FIGURES), key=path.name)
    return Named(path.stem, about, tuple(_claim(text, path.name) for text in claims))


def _claim(text: str, key: str) -> Claim:
    match = _CLAIM.fullmatch(text)
    if match is None:
        allowed = "ARM METRIC below (or above) ARM (METRIC) (or a number) (by NUMBER)"
        raise InputError(got=f"Claim: {text}", allowed=allowed, key=key)
    arm, metric, side, against, other, margin = match.groups()
    return Claim(text, arm, metric, side, against, other or metric, float(margin or 0))


def commands(named: Named, folder: Path) -> list[list[str]]:
    """Arguments of ``cl-moe`` for each of the experiment's commands, kept and gone on with in ``folder``."""
    found = []
    for index, part in enumerate(named.about["Command"].split("&&")):
        program, *words = shlex.split(part)
        if program != "cl-moe":
            raise InputError(got=part.strip(), allowed="cl-moe ... && cl-moe ...", key=f"{named.name}.yaml")
        place = folder / named.name / str(index)
        kept = f"hydra.{'sweep' if '-m' in words or '--multirun' in words else 'run'}.dir={place}"
        store = [f"tracking.uri={_store(folder)}", f"mlflow_experiment={named.name}"]
        found.append([*words, *store, kept, "auto_resume=true"])
    return found


def judge(claim: Claim, arms: Sequence[Arm], how: Inference = Inference()) -> Verdict:  # noqa: B008
    """Hold a claim against the paired differences.

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
    low, high = found.shown if claim.side == "above" else (-found.shown.high, -found.shown.low)
    if math.isnan(low):
        word = "not to be told from one pair"
    elif low > claim.margin:
        word = "reproduced"
    else:
        word = "contradicted" if high < claim.margin else "not at this scale"
    return Verdict(claim, found, word)


def section(named: Named, arms: Sequence[Arm], verdicts: Sequence[Verdict], main: str) -> str:
    """What stands between the marks: the question, how to run it, numbers, verdicts, the figure."""
    about = named.about
    asked = [key for claim in named.claims for key in (claim.metric, claim.other)]
    metrics = list(dict.fromkeys([main, *asked]))
    heads = ["arm", "seeds x orders", *(head(key) for key in metrics)]
    rows = [[a.full or a.name, f"{a.num_seeds} x {a.num_orders}", *_cells(a, metrics)] for a in arms]
    table = [f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows)]
    return "\n".join(
        [
            f"{about['Question'][:1].upper()}{about['Question'][1:]} ({about['Source']})",
            "",
            *(f"- **{_sentence(one)}**: {_numbers(one.found)}" for one in verdicts),
            "",
            *table,
            "",
            f"![{about['Figure']}](images/results_{named.name}.png)",
            "",
            f"`{about['Command']}` ({about['Run time'].rstrip('.')}). Full scale: {about['Full scale']}",
        ]
    )


def put(text: str, name: str, inside: str) -> str:
    """A page with the section of that name written anew, or behind all else if it has none yet.

    >>> print(put("mine\\n", "a", "one"), end="")
    mine
    <BLANKLINE>
    ## a
    <!-- results: a -->
    one
    <!-- end of results: a -->
    >>> put(put("mine\\n", "a", "one"), "a", "two") == put("mine\\n", "a", "two")
    True
    """
    begin, end = f"<!-- results: {name} -->\n", f"<!-- end of results: {name} -->\n"
    if begin not in text:
        return f"{text.rstrip()}\n\n## {name}\n{begin}{inside}\n{end}"
    before, _, rest = text.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise InputError(got=f"{begin.strip()} without an end", allowed=end.strip(), key="docs/RESULTS.md")
    return f"{before}{begin}{inside}\n{end}{after}"


def write_up(named: Named, folder: Path, page: Path) -> list[Verdict]:
    """Compare the runs of an experiment, judge its claims, write its section and its figure."""
    out = folder / named.name / "comparison"
    compare.compare(_store(folder), named.name, out=out)
    selection = read_runs(open_store(_store(folder), create=False, key="results"), named.name, None)
    streams, _ = by_stream(selection.runs, ("arm",), False)
    arms = [arm for found in streams.values() for arm in found]
    verdicts = [judge(claim, arms) for claim in named.claims]
    main = main_metric(arms)
    page.parent.joinpath("images").mkdir(parents=True, exist_ok=True)
    first = next(arm.runs[0] for arm in arms if (arm.full or arm.name) == named.claims[0].arm)
    found = [*out.rglob(name := f"{named.about['Figure']}.png"), Path(first.artifacts) / name]
    figure = Image.open(found[0]).convert("RGB")
    figure.thumbnail((WIDTH, 10 * WIDTH), Image.Resampling.LANCZOS)
    figure.quantize(256).save(page.parent / "images" / f"results_{named.name}.png", optimize=True)
    text = page.read_text(encoding="utf-8") if page.exists() else "# Results\n"
    page.write_text(put(text, named.name, section(named, arms, verdicts, main)), encoding="utf-8")
    return verdicts


def main(*names: str) -> int:
    """Run and write up the experiments of these names, or all that claim something."""
    files = sorted((ROOT / "conf" / "experiment").glob("*.yaml"))
    known = {one.name: one for one in map(read, files) if one is not None}
    for name in names:
        if name not in known:
            raise InputError(got=name, allowed=", ".join(known) or "none yet", key="results")
    folder, status = Path("results").absolute(), 0
    for name in names or known:
        for words in commands(known[name], folder):
            print(f"results: cl-moe {shlex.join(words)}", flush=True)
            done = subprocess.run([sys.executable, "-m", "cl_moe", *words], check=False).returncode
            if done:
                print(f"results: {name} ended with status {done}; the same command goes on", file=sys.stderr)
                status = done
                break
        else:
            for verdict in write_up(known[name], folder, _page()):
                print(f"results: {name}: {_sentence(verdict)}: {_numbers(verdict.found)}", flush=True)
    return status


def _page() -> Path:
    return ROOT / "docs" / "RESULTS.md"


def _store(folder: Path) -> str:
    return f"sqlite:///{folder / 'mlflow.db'}"


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[-+]?[\d.]+", text) is not None


def _cells(arm: Arm, metrics: Sequence[str]) -> list[str]:
    spreads = [arm.spread(key) for key in metrics]
    return [f"{short(one.mean)} ± {short(one.std)}" if one.num > 1 else short(one.mean) for one in spreads]


def _sentence(one: Verdict) -> str:
    return f"{one.word}: {one.claim.text}"


def _numbers(one: Contrast) -> str:
    """The mean difference, its interval, the pairs, p."""
    low, high = one.shown
    interval = "" if math.isnan(low) else f", 95% interval [{signed(low)}, {signed(high)}]"
    return f"{signed(one.mean)}{interval}, {one.pairs} pairs, p {p_text(one.p)}"


if __name__ == "__main__":
    try:
        sys.exit(main(*sys.argv[1:]))
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
