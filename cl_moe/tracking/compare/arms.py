"""Arms: the runs of one group on one stream. What must not be averaged is kept apart here, and said."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from cl_moe.errors import InputError
from cl_moe.tracking.compare.runs import CONTEXT, LOSS, Pair, Run, shortened
from cl_moe.tracking.compare.statistics import Spread, spread

if TYPE_CHECKING:
    from cl_moe.stream import Kind

_Kind = tuple[str, frozenset[tuple[str, str]]]
_MEASURED = {"definitions": "definitions of the metrics", "data": "data", "experiences": "lengths"}
# Where, when and by which seeds a run ran is no part of its configuration.
_NOT_CONFIGURATION: tuple[str, ...] = ("seed.", "stream.", "tracking.", "checkpoint.", "eval.", "output_dir")
_NOT_CONFIGURATION += (
    "resume",
    "auto_resume",
    "branch",
    "objective",
    "mlflow_experiment",
    "arm",
    "reproduce",
)


@dataclass(frozen=True)
class Arm:
    """The runs of one group on one stream, oldest first.

    Args:
        name: as tables show it.
        runs: one per pair, unless the group holds several configurations.
        context: the groups of the configuration that are part of a pair.
        full: the name in MLflow, where ``name`` leaves out what all arms share.
    """

    name: str
    runs: list[Run] = field(default_factory=list)
    context: tuple[str, ...] = ()
    full: str = ""

    @property
    def num_seeds(self) -> int:
        """Distinct pairs of init and data seed."""
        return len({(run.seeds[0], run.seeds[2]) for run in self.runs})

    @property
    def num_orders(self) -> int:
        """Distinct orders."""
        return len({run.seeds[1] for run in self.runs})

    def values(self, key: str) -> dict[Pair, float]:
        """``{pair: value}``; the mean where the group holds several configurations of the same pair."""
        per_pair: dict[Pair, list[float]] = {}
        for run in self.runs:
            if key in run.metrics:
                per_pair.setdefault(run.pair(self.context), []).append(run.metrics[key])
        return {pair: sum(values) / len(values) for pair, values in per_pair.items()}

    def spread(self, key: str) -> Spread:
        """Over the seeds and orders."""
        return spread(list(self.values(key).values()))


def kind_of(arms: Sequence[Arm]) -> Kind:
    """The kind of the arms' stream: as the runs say; of runs that do not say, by what they measured."""
    runs = [run for arm in arms for run in arm.runs]
    if any(run.about.get("kind") == "regression" for run in runs):
        return "regression"
    return "language" if any(LOSS in run.metrics for run in runs) else "classification"


def by_stream(
    runs: Iterable[Run], keys: Sequence[str], mixed: bool = False
) -> tuple[dict[str, list[Arm]], list[str]]:
    """``{stream: arms}`` in the order in which they were first run, and notes on what is left out or apart.

    A stream is its name, scenario and settings, the definitions of the metrics, its data and its number of
    experiences: runs that differ in one of these are never in one table. Of several runs of one pair the
    newest counts. An arm holds runs of one version of the code, its newest, unless ``mixed``.

    Raises:
        InputError: no key, or no run has a param or tag of that name.
    """
    runs = list(runs)
    if not keys:
        raise InputError(got="no key", allowed="at least one param or tag", key="--group-by")
    for key in keys:
        if not any(key in run.about for run in runs):
            known = {name for run in runs for name in run.about if not name.startswith("mlflow.")}
            told = sorted(name for name in known if not name.endswith(("_target_", "_partial_")))
            raise InputError(got=f"the key {key!r}", allowed=", ".join(told) or "none", key="--group-by")
    context, kinds = context_of(keys), _kinds(runs)
    titles, notes = _titles(kinds)
    newest, doubles = _newest(runs, kinds, keys, context)
    streams: dict[str, dict[str, Arm]] = {}
    for run in newest:
        name, title = run.label(keys), titles[kinds[run.run_id]]
        arm = Arm(name, [], context, name)
        streams.setdefault(title, {}).setdefault(name, arm).runs.append(run)
    shown: dict[str, list[Arm]] = {}
    notes += doubles
    for title, arms in streams.items():
        kept = []
        for arm in arms.values():
            one, said = of_one_code(arm, mixed)
            kept.append(one)
            notes += [f"{title}: {note}" if len(streams) > 1 else note for note in said]
        shown[title] = kept
    return shown, notes


def context_of(keys: Sequence[str]) -> tuple[str, ...]:
    """The groups that pairs must share: those that no key is of. The param ``arm`` names them all.

    >>> context_of(["arm"]), context_of(["strategy", "growth.num_experts"])
    ((), ('model', 'layer', 'router', 'freeze', 'prune'))
    """
    if "arm" in keys:
        return ()
    grouped = {key.partition(".")[0] for key in keys}
    grouped |= {"router"} if "layer" in grouped else set()  # another layer has another router, or none
    return tuple(group for group in CONTEXT if group not in grouped)


def of_one_code(arm: Arm, mixed: bool) -> tuple[Arm, list[str]]:
    """The arm with the runs of its newest version of the code, and what is left out; all of them if mixed."""
    codes = Counter(run.code for run in arm.runs)
    if len(codes) == 1:
        return arm, []
    listed = ", ".join(f"{count} of {code}" for code, count in codes.items())
    if mixed:
        return arm, [f"{arm.name} averages runs of several versions of the code: {listed}."]
    code = max(arm.runs, key=lambda run: run.started).code
    others = ", ".join(f"{count} of {other}" for other, count in codes.items() if other != code)
    kept = replace(arm, runs=[run for run in arm.runs if run.code == code])
    return kept, [
        f"{arm.name} has runs of several versions of the code: counted {codes[code]} of {code}, the newest, "
        f"left out {others}. --mixed counts all."
    ]


def without_common_words(arms: Sequence[Arm]) -> tuple[list[Arm], str]:
    """Arms whose names leave out the ``key=value`` words that all of them have, and those words."""
    words = [arm.name.split(" ") for arm in arms]
    common = {word for word in words[0] if "=" in word and all(word in others for others in words)}
    if len(arms) < 2 or not common or any("," in arm.name for arm in arms):
        return list(arms), ""
    names = [" ".join(word for word in row if word not in common) for row in words]
    if "" in names or len(set(names)) < len(names):
        return list(arms), ""
    shown = [replace(arm, name=name) for arm, name in zip(arms, names, strict=True)]
    return shown, " ".join(word for word in words[0] if word in common)


def choose_baseline(arms: Sequence[Arm], name: str | None) -> Arm | None:
    """The arm of that name, None if it is not there; without a name plain training, else any arm.

    Of several the one called ``naive``, else the first of those that share most pairs with other arms.
    """
    if name is not None:
        return next((arm for arm in arms if name in (arm.name, arm.full)), None)
    plain = [arm for arm in arms if all(_is_plain(run) for run in arm.runs)] or list(arms)
    pairs = {arm.name: {run.pair(arm.context) for run in arm.runs} for arm in arms}

    def shared(arm: Arm) -> int:
        return sum(len(pairs[arm.name] & theirs) for name, theirs in pairs.items() if name != arm.name)

    return next((arm for arm in plain if arm.name == "naive"), max(plain, key=shared))


def notes_on(arms: Sequence[Arm], baseline: Arm | None, metric: str) -> list[str]:
    """What a reader of the means of these arms must know: code, configurations, gaps, missing partners."""
    notes = [*_code_notes(arms)]
    if mixtures := [f"{arm.name} in {keys}" for arm in arms if (keys := _configurations(arm))]:
        notes.append(f"Averages over runs of several configurations: {shortened(mixtures)}.")
    gaps = [
        f"{missing} of {len(arm.runs)} runs of {arm.name}"
        for arm in arms
        if (missing := sum(metric not in run.metrics for run in arm.runs))
    ]
    if gaps:
        notes.append(f"No finite {metric} in {shortened(gaps)}: they are not in its means.")
    lonely = [] if baseline is None else [*_lonely(arms, baseline, metric)]
    if lonely:
        notes.append(f"Without a partner, so not in the paired differences: {shortened(lonely)}.")
    return notes


def _code_notes(arms: Sequence[Arm]) -> Iterable[str]:
    codes: dict[str, list[str]] = {}
    for arm in arms:
        for code in dict.fromkeys(run.code for run in arm.runs):
            codes.setdefault(code, []).append(arm.name)
    if len(codes) > 1:
        listed = "; ".join(f"{code}: {shortened(names)}" for code, names in codes.items())
        yield f"The arms are of several versions of the code, so differences may be the code's: {listed}."
    if changed := [code for code in codes if code.endswith("changed")]:
        yield f"The code of runs of {shortened(changed)} is not known: its checkout was changed (git_dirty)."


def _configurations(arm: Arm) -> str:
    """The keys in which an arm's runs differ, with their values; empty if it is one configuration."""
    values: dict[str, set[str]] = {}
    for run in arm.runs:
        for key in run.params:
            if not key.startswith(_NOT_CONFIGURATION) and not key.endswith("_partial_"):
                values.setdefault(key, set()).add(run.about[key])
    several = {key: found for key, found in values.items() if len(found) > 1}
    return shortened(f"{key} ({shortened(sorted(found), 3)})" for key, found in sorted(several.items()))


def _lonely(arms: Sequence[Arm], baseline: Arm, metric: str) -> Iterable[str]:
    theirs = baseline.values(metric).keys()
    for arm in arms:
        ours = arm.values(metric).keys()
        for lacking, pairs in ((baseline, ours - theirs), (arm, theirs - ours)):
            if pairs:
                yield f"{lacking.name} lacks {shortened(sorted(map(str, pairs)), 2)}" + (
                    f" (of {arm.name})" if lacking is baseline else ""
                )


def _kinds(runs: Sequence[Run]) -> dict[str, _Kind]:
    """``{run id: what is measured}``: a run that does not tell its data or length goes with most others.

    Data depend on the order and on the data seed, so checksums are held against those of the same ones.
    """
    kinds: dict[str, _Kind] = {run.run_id: (run.stream, run.variant) for run in runs}
    for name in ("data", "experiences"):
        known: dict[Hashable, Counter[str]] = {}
        for run in runs:
            if (value := _told(run, name)) is not None:
                known.setdefault(_alike(run, kinds, name), Counter())[value] += 1
        others = {
            run.run_id: value
            for run in runs
            if (value := _told(run, name)) is not None
            and value != known[_alike(run, kinds, name)].most_common(1)[0][0]
        }
        for run_id, value in others.items():
            stream, variant = kinds[run_id]
            kinds[run_id] = (stream, variant | {(name, value)})
    return kinds


def _alike(run: Run, kinds: Mapping[str, _Kind], name: str) -> Hashable:
    """What runs must share for their data, or their numbers of experiences, to be the same."""
    return (kinds[run.run_id], run.seeds[1:] if name == "data" else ())


def _told(run: Run, name: str) -> str | None:
    if name == "data":
        return run.about.get("data_checksum")
    return None if run.num_experiences is None else str(run.num_experiences)


def _titles(kinds: dict[str, _Kind]) -> tuple[dict[_Kind, str], list[str]]:
    """A title for every stream: its name, and what tells it from others of that name."""
    variants: dict[str, list[frozenset[tuple[str, str]]]] = {}
    for name, variant in dict.fromkeys(kinds.values()):
        variants.setdefault(name, []).append(variant)
    titles, notes = {}, []
    for name, several in variants.items():
        common = frozenset.intersection(*several)
        for variant in several:
            own = ", ".join(
                f"{key.removeprefix('stream.')}={value}" for key, value in sorted(variant - common)
            )
            titles[name, variant] = f"{name} {own}" if own else name
        apart = {key for variant in several for key, _ in variant - common}
        if what := [words for key, words in _MEASURED.items() if key in apart]:
            notes.append(f"{name}: runs of several {', '.join(what)} are never averaged; a table for each.")
    return titles, notes


def _newest(
    runs: Sequence[Run], kinds: dict[str, _Kind], keys: Sequence[str], context: Sequence[str]
) -> tuple[list[Run], list[str]]:
    newest: dict[Hashable, Run] = {}
    doubles: Counter[str] = Counter()
    for run in sorted(runs, key=lambda run: run.started):
        arm = run.about.get("arm", run.run_id)
        same = (kinds[run.run_id], run.label(keys), arm, run.pair(context))
        doubles[arm] += same in newest
        newest[same] = run
    names = shortened(f"{arm} ({count})" for arm, count in doubles.items() if count)
    notes = [f"Several runs of one arm with the same seeds: the newest counts, left out: {names}."]
    return sorted(newest.values(), key=lambda run: run.started), notes if names else []


def _is_plain(run: Run) -> bool:
    return run.about.get("strategy") == "naive" and run.about.get("growth") == "never"
