"""Which runs a comparison is about: read from MLflow, doubles removed, grouped into arms of one stream."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cl_moe.errors import InputError
from cl_moe.tracking.compare_statistics import Difference, Spread, paired_difference, spread

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as StoredRun

SEEDS = ("seed.init", "seed.order", "seed.data")
_NOT_VARIANT = {
    "stream.order",
    "stream.seed",
    "stream.data_seed",
}  # orders and seeds, which pairs are made by
_PAGE = 1000
_LAYER = re.compile(r"experts/layer_\d+/(?P<name>[a-z_]+)")
_LOWER_IS_BETTER = re.compile(
    r"loss|perplexity|forgetting|intransigence|cost/(?!tokens_per_second)|"
    r"unevenness|gini|max_violation|dead|drop|drift|leak"
)


@dataclass(frozen=True)
class Run:
    """One finished run.

    Args:
        run_id: MLflow's.
        started: milliseconds since 1970.
        about: params and tags by key; a tag goes before a param of the same name.
        metrics: last value of every metric, and of ``experts/<name>`` the mean over the layers.
        artifacts: where its files are: a folder, or a URI that MLflow understands.
    """

    run_id: str
    started: int
    about: dict[str, str]
    metrics: dict[str, float]
    artifacts: str = ""

    @property
    def stream(self) -> str:
        """Name and scenario: what must be the same before anything is averaged."""
        name, scenario = self.about.get("stream", "-"), self.about.get("scenario")
        return f"{name} ({scenario})" if scenario else name

    @property
    def variant(self) -> frozenset[tuple[str, str]]:
        """The stream's settings: another cut or another set of domains is another stream."""
        return frozenset(
            (key, value)
            for key, value in self.about.items()
            if key.startswith("stream.") and key not in _NOT_VARIANT
        )

    @property
    def seeds(self) -> tuple[str, ...]:
        """The values of ``SEEDS``: what a pair of runs has in common."""
        return tuple(self.about.get(key, "-") for key in SEEDS)

    def label(self, keys: Sequence[str]) -> str:
        """The name of the run's group: the bare value for one key, ``key=value`` for several."""
        if len(keys) == 1:
            return self.about.get(keys[0], "-")
        return ", ".join(f"{key}={self.about.get(key, '-')}" for key in keys)


@dataclass(frozen=True)
class Arm:
    """The runs of one group on one stream, oldest first."""

    name: str
    runs: list[Run] = field(default_factory=list)

    @property
    def num_seeds(self) -> int:
        """Distinct pairs of init and data seed."""
        return len({(run.seeds[0], run.seeds[2]) for run in self.runs})

    @property
    def num_orders(self) -> int:
        """Distinct order seeds."""
        return len({run.seeds[1] for run in self.runs})

    def values(self, key: str) -> dict[Hashable, float]:
        """``{seeds: value}``; the mean where the group holds several runs of the same seeds."""
        per_seeds: dict[Hashable, list[float]] = {}
        for run in self.runs:
            if key in run.metrics:
                per_seeds.setdefault(run.seeds, []).append(run.metrics[key])
        return {seeds: sum(values) / len(values) for seeds, values in per_seeds.items()}

    def spread(self, key: str) -> Spread:
        """Over the seeds and orders."""
        return spread(list(self.values(key).values()))

    def against(self, baseline: Arm, key: str) -> Difference:
        """This arm minus the baseline, over the seeds and orders that both have."""
        return paired_difference(self.values(key), baseline.values(key))


@dataclass(frozen=True)
class Selection:
    """What was found: runs that count, and notes on those that do not."""

    runs: list[Run]
    notes: list[str]


def read_runs(client: MlflowClient, experiment: str, sweep: str | None = None) -> Selection:
    """The finished runs of an experiment, one per stream, arm and seeds: the newest.

    Raises:
        InputError: no such experiment, or no finished run in it (in that sweep).
    """
    from cl_moe.tracking.store import must

    uri = client.tracking_uri
    found = must(uri, lambda: client.get_experiment_by_name(experiment))
    if found is None or found.lifecycle_stage != "active":
        names = must(uri, lambda: [known.name for known in client.search_experiments()])
        raise InputError(
            got=f"the experiment {experiment!r}, which {uri} does not have",
            allowed=", ".join(sorted(names)) or "none: the store is empty",
            key="--experiment (or --uri)",
        )
    stored = must(uri, lambda: _pages(client, found.experiment_id))
    if sweep is not None:
        stored = [run for run in stored if run.data.tags.get("sweep") == sweep]
    finished = [_read(run) for run in stored if run.info.status == "FINISHED"]
    if not finished:
        raise InputError(
            got=f"no finished run among the {len(stored)} of experiment {experiment!r}"
            + (f" in sweep {sweep!r}" if sweep is not None else ""),
            allowed="at least one finished run",
            key="--sweep" if sweep is not None else "--experiment",
        )
    return _newest(finished, _left_out(stored))


def _titles(runs: Iterable[Run]) -> dict[tuple[str, frozenset[tuple[str, str]]], str]:
    """A title for every stream: its name, and what tells it from others of that name."""
    variants: dict[str, list[frozenset[tuple[str, str]]]] = {}
    for run in runs:
        if run.variant not in variants.setdefault(run.stream, []):
            variants[run.stream].append(run.variant)
    titles = {}
    for name, several in variants.items():
        common = frozenset.intersection(*several)
        for variant in several:
            own = ", ".join(
                f"{key.removeprefix('stream.')}={value}" for key, value in sorted(variant - common)
            )
            titles[name, variant] = f"{name} {own}" if own else name
    return titles


def by_stream(runs: Iterable[Run], keys: Sequence[str]) -> dict[str, list[Arm]]:
    """``{stream: arms}``, in the order in which streams and arms were first run.

    Raises:
        InputError: no run has a param or tag of that name.
    """
    runs = list(runs)
    for key in keys:
        if not any(key in run.about for run in runs):
            known = sorted({name for run in runs for name in run.about if not name.startswith("mlflow.")})
            raise InputError(got=f"the key {key!r}", allowed=", ".join(known) or "none", key="--group-by")
    titles = _titles(runs)
    streams: dict[str, dict[str, Arm]] = {}
    for run in runs:
        name, title = run.label(keys), titles[run.stream, run.variant]
        streams.setdefault(title, {}).setdefault(name, Arm(name)).runs.append(run)
    return {stream: list(arms.values()) for stream, arms in streams.items()}


def choose_baseline(arms: Sequence[Arm], name: str | None) -> Arm | None:
    """The arm of that name, None if it is not there; without a name plain training, else the first arm."""
    if name is not None:
        return next((arm for arm in arms if arm.name == name), None)
    plain = [arm for arm in arms if all(_is_plain(run) for run in arm.runs)]
    return next((arm for arm in plain if arm.name == "naive"), (plain or list(arms))[0])


def lower_is_better(key: str) -> bool:
    """Which way a metric counts.

    >>> [lower_is_better(key) for key in ("stream/forgetting", "stream/average_accuracy", "cost/seconds")]
    [True, False, True]
    """
    return _LOWER_IS_BETTER.search(key) is not None


def _is_plain(run: Run) -> bool:
    return run.about.get("strategy") == "naive" and run.about.get("growth") == "never"


def _pages(client: MlflowClient, experiment_id: str) -> list[StoredRun]:
    stored: list[StoredRun] = []
    token: str | None = None
    while True:
        page = client.search_runs(
            [experiment_id], max_results=_PAGE, order_by=["attributes.start_time ASC"], page_token=token
        )
        stored.extend(page)
        token = page.token
        if not token:
            return stored


def _read(stored: StoredRun) -> Run:
    metrics = dict(stored.data.metrics)
    layers: dict[str, list[float]] = {}
    for key, value in metrics.items():
        if match := _LAYER.fullmatch(key):
            layers.setdefault(f"experts/{match['name']}", []).append(value)
    metrics |= {key: sum(values) / len(values) for key, values in layers.items()}
    about = {**stored.data.params, **stored.data.tags}
    return Run(stored.info.run_id, stored.info.start_time, about, metrics, stored.info.artifact_uri)


def _left_out(stored: Iterable[StoredRun]) -> list[str]:
    words = {"FAILED": "failed", "KILLED": "stopped"}
    counts = Counter(words.get(run.info.status, "running") for run in stored if run.info.status != "FINISHED")
    left = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
    return [f"Left out: {left}."] if left else []


def _newest(runs: Sequence[Run], notes: list[str]) -> Selection:
    newest: dict[Hashable, Run] = {}
    doubles: Counter[str] = Counter()
    for run in sorted(runs, key=lambda run: run.started):
        same = (run.stream, run.variant, run.about.get("arm", run.run_id), run.seeds)
        doubles[run.about.get("arm", "-")] += same in newest
        newest[same] = run
    names = ", ".join(f"{arm} ({count})" for arm, count in doubles.items() if count)
    if names:
        notes = [
            *notes,
            f"Several runs of one arm with the same seeds: the newest counts, left out: {names}.",
        ]
    return Selection(sorted(newest.values(), key=lambda run: run.started), notes)
