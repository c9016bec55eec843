"""The named experiments that make a claim: run where they are not done yet, judged, written up.

An experiment of ``conf/experiment`` takes part if its first lines have a ``Claim``:

    # Question: does a little replay keep more than plain fine-tuning?
    # Source:   where the claim stands
    # Command:  cl-moe -m experiment=NAME strategy=naive,replay seed.init=0,1,2 'seed.data=${seed.init}'
    # Run time: 2 minutes on 2 cores
    # Full scale: the overrides with which it is the source's own experiment
    # Derive:   trend = slope stream/average_loss over layer.num_experts of moe_*
    # Claim:    replay stream/forgetting below naive
    # Show:     cost/train_flops
    # Figure:   pareto

A claim is an arm, a metric, ``below`` or ``above``, and another arm (with a metric of its own behind it, if
that is another one) or a number, perhaps ``by`` a margin; or ``within`` and a margin; there may be several.
It is reproduced if the whole 95% interval of the paired difference lies on the side that it names, beyond the
margin (``within``: inside it), contradicted if all of it lies on the other side, and else not to be told at
this scale. ``Derive`` makes an arm of others (``cl_moe.tracking.compare.families``), ``Show`` names further
columns. ``Figure`` is one of the comparison's, ``stability_gap`` of the first claim's arm, ``families`` (the
derived curves), ``learning`` (losses inside), ``trade`` (old losses over the newest, inside). Lines go on
behind three spaces, commands behind ``&&``.

Runs are kept in ``results/``, with an MLflow store of their own. Finished ones are not run again, and those
that were stopped go on. A section between two marks of ``docs/RESULTS.md`` is written anew; all else there
stays as it is.

    python benchmarks/results.py [--jobs N] [NAME ...]     (N runs of a sweep side by side: needs joblib)
"""

from __future__ import annotations

import argparse
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
from cl_moe.tracking.compare.claims import Claim, Verdict, judge, numbers, read_claim, sentence
from cl_moe.tracking.compare.families import Derived, derive, family, read_derived
from cl_moe.tracking.compare.inside import folder_of, inside_curve, trade_curve
from cl_moe.tracking.compare.runs import read_runs
from cl_moe.tracking.compare.table import head, main_metric, short
from cl_moe.tracking.figures import save
from cl_moe.tracking.figures.families import families, learning, trade
from cl_moe.tracking.store import open_store

ROOT = Path(__file__).resolve().parents[1]
FIGURES = (
    "forgetting_curves",
    "accuracy_matrix",
    "expert_load",
    "pareto",
    "forgetting_parts",
    "stability_gap",
    "families",
    "learning",
    "trade",
)
FIELDS = ("Question", "Source", "Command", "Run time", "Full scale", "Derive", "Claim", "Show", "Figure")
SEVERAL = ("Derive", "Claim")
_NEEDED = ("Question", "Source", "Command", "Run time", "Full scale")
_FIELD = re.compile(rf"# ({'|'.join(FIELDS)}): +(.*)")
WIDTH = 1100  # pixels of a figure


class Named(NamedTuple):
    """An experiment as its file describes it: every field's text, the arms made of others, and its claims."""

    name: str
    about: Mapping[str, str]
    derived: tuple[Derived, ...]
    claims: tuple[Claim, ...]


def read(path: Path) -> Named | None:
    """The description at the top of an experiment's file; None if it claims nothing.

    Raises:
        InputError: a claim that cannot be read, or a field is missing beside it.
    """
    about: dict[str, str] = {}
    several: dict[str, list[str]] = {field: [] for field in SEVERAL}
    field = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if match := _FIELD.match(line):
            field, text = match[1], match[2].strip()
            if field in several:
                several[field].append(text)
            else:
                about[field] = text
        elif field and line.startswith("#   "):
            if field in several:
                several[field][-1] += f" {line[1:].strip()}"
            else:
                about[field] += f" {line[1:].strip()}"
    if not several["Claim"]:
        return None
    if missing := [field for field in _NEEDED if field not in about]:
        raise InputError(got=f"{path.name} without {missing[0]}", allowed=", ".join(_NEEDED), key=path.name)
    figure = about.setdefault("Figure", FIGURES[0])
    if figure not in FIGURES:
        raise InputError(got=f"Figure: {figure}", allowed=", ".join(FIGURES), key=path.name)
    derived = tuple(read_derived(text, path.name) for text in several["Derive"])
    return Named(path.stem, about, derived, tuple(read_claim(text, path.name) for text in several["Claim"]))


def commands(named: Named, folder: Path, jobs: int = 1) -> list[list[str]]:
    """Arguments of ``cl-moe`` for each of the experiment's commands, kept and gone on with in ``folder``."""
    found = []
    for index, part in enumerate(named.about["Command"].split("&&")):
        program, *words = shlex.split(part)
        if program != "cl-moe":
            raise InputError(got=part.strip(), allowed="cl-moe ... && cl-moe ...", key=f"{named.name}.yaml")
        place = folder / named.name / str(index)
        sweep = "-m" in words or "--multirun" in words
        kept = [f"hydra.{'sweep' if sweep else 'run'}.dir={place}"]
        if sweep and jobs > 1:
            kept += ["hydra/launcher=workstation", f"hydra.launcher.n_jobs={jobs}"]
        store = [f"tracking.uri={_store(folder)}", f"mlflow_experiment={named.name}"]
        found.append([*words, *store, *kept, "auto_resume=true"])
    return found


def section(named: Named, arms: Sequence[Arm], verdicts: Sequence[Verdict], main: str) -> str:
    """What stands between the marks: the question, how to run it, numbers, verdicts, the figure."""
    about = named.about
    asked = [key for claim in named.claims for key in (claim.metric, claim.other)]
    metrics = list(dict.fromkeys([main, *asked, *about.get("Show", "").split()]))
    heads = ["arm", "seeds x orders", *(head(key) for key in metrics)]
    rows = [[a.full or a.name, f"{a.num_seeds} x {a.num_orders}", *_cells(a, metrics)] for a in arms]
    table = [f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows)]
    return "\n".join(
        [
            f"{about['Question'][:1].upper()}{about['Question'][1:]} ({about['Source']})",
            "",
            *(f"- **{sentence(one)}**: {numbers(one.found)}" for one in verdicts),
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
    streams, notes = by_stream(selection.runs, ("arm",), False)
    for note in (*selection.notes, *notes):  # runs that do not count: of other code, unfinished, ...
        print(f"results: {named.name}: {note}", file=sys.stderr)
    arms = [arm for found in streams.values() for arm in found]
    main = main_metric(arms)
    arms += [derive(one, arms) for one in named.derived]
    verdicts = [judge(claim, arms) for claim in named.claims]
    page.parent.joinpath("images").mkdir(parents=True, exist_ok=True)
    figure = Image.open(_figure(named, arms, out)).convert("RGB")
    figure.thumbnail((WIDTH, 10 * WIDTH), Image.Resampling.LANCZOS)
    figure = figure.quantize(256, Image.Quantize.MAXCOVERAGE)  # the default one gives two arms one colour
    figure.save(page.parent / "images" / f"results_{named.name}.png", optimize=True)
    text = page.read_text(encoding="utf-8") if page.exists() else "# Results\n"
    page.write_text(put(text, named.name, section(named, arms, verdicts, main)), encoding="utf-8")
    return verdicts


def _figure(named: Named, arms: Sequence[Arm], out: Path) -> Path:
    """Where the experiment's figure is; what is drawn of derived arms is drawn now."""
    kind = named.about["Figure"]
    real = [arm for arm in arms if all(one.name != arm.name for one in named.derived)]
    if kind == "families":
        drawn = [found for one in named.derived if (found := family(one, real)) is not None]
        return save(families(drawn), out / "families.png")
    if kind in ("learning", "trade"):
        read, draw = (inside_curve, learning) if kind == "learning" else (trade_curve, trade)
        curves = {arm.full or arm.name: [read(run) for run in arm.runs] for arm in real}
        return save(draw(curves), out / f"{kind}.png")
    first = next(arm.runs[0] for arm in arms if (arm.full or arm.name) == named.claims[0].arm)
    return [*out.rglob(f"{kind}.png"), folder_of(first) / f"{kind}.png"][0]


def main(*names: str, jobs: int = 1) -> int:
    """Run and write up the experiments of these names, or all that claim something."""
    files = sorted((ROOT / "conf" / "experiment").glob("*.yaml"))
    known = {one.name: one for one in map(read, files) if one is not None}
    for name in names:
        if name not in known:
            raise InputError(got=name, allowed=", ".join(known) or "none yet", key="results")
    folder, status = Path("results").absolute(), 0
    for name in names or known:
        for words in commands(known[name], folder, jobs):
            print(f"results: cl-moe {shlex.join(words)}", flush=True)
            done = subprocess.run([sys.executable, "-m", "cl_moe", *words], check=False).returncode
            if done:
                print(f"results: {name} ended with status {done}; the same command goes on", file=sys.stderr)
                status = done
                break
        else:
            for verdict in write_up(known[name], folder, _page()):
                print(f"results: {name}: {sentence(verdict)}: {numbers(verdict.found)}", flush=True)
    return status


def _page() -> Path:
    return ROOT / "docs" / "RESULTS.md"


def _store(folder: Path) -> str:
    return f"sqlite:///{folder / 'mlflow.db'}"


def _cells(arm: Arm, metrics: Sequence[str]) -> list[str]:
    spreads = [arm.spread(key) for key in metrics]
    return [f"{short(one.mean)} ± {short(one.std)}" if one.num > 1 else short(one.mean) for one in spreads]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Run and write up experiments that make a claim.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="of conf/experiment; all that are not done")
    parser.add_argument("--jobs", type=int, default=1, help="runs of a sweep side by side")
    options = parser.parse_args()
    try:
        sys.exit(main(*options.names, jobs=options.jobs))
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
