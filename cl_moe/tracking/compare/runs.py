"""The runs that a comparison is about, read from MLflow: one query per thousand of them."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from cl_moe.errors import InputError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as StoredRun

ACCURACY, LOSS = "stream/average_accuracy", "stream/average_loss"
SEEDS = ("seed.init", "seed.order", "seed.data")
CONTEXT = ("model", "layer", "router", "growth", "freeze", "prune", "strategy")
"""The groups that tell arms apart; what is not grouped by is part of a pair."""
_UNSAID = {"prune": "never"}
"""Of groups that runs of earlier versions do not name."""

_NOT_VARIANT = {
    "stream.order",
    "stream.seed",
    "stream.data_seed",
    "strategy.gdumb.seed",
}  # orders and seeds, which pairs are made by
_FIRST_DEFINITIONS = "1"  # of runs from before the tag
_REPRODUCTION = "reproduces"  # the tag of a run that repeats another
_PAGE = 1000
_LAYER = re.compile(r"experts/layer_\d+/(?P<name>[a-z_]+)")
_EXPERIENCE = re.compile(r"(?:accuracy|loss)/experience_(\d+)")
_INFINITE = 1.7e308  # the store's word for infinity is the largest float
_LOWER_IS_BETTER = re.compile(
    r"loss|perplexity|forgetting|intransigence|cost/(?!tokens_per_second|compression)|"
    r"unevenness|gini|squared_cv|max_violation|dead|drop|drift|leak|calibration|dormant|latency"
)


class Pair(NamedTuple):
    """What two runs of two arms must have in common to be a pair.

    Args:
        order: the order of the experiences.
        seed: init and data seed, and behind them the values of the groups that arms are not made of.
    """

    order: str
    seed: tuple[str, ...]

    def __str__(self) -> str:
        words = [f"init={self.seed[0]}", f"order={self.order}", f"data={self.seed[1]}", *self.seed[2:]]
        return " ".join(words)


@dataclass(frozen=True)
class Run:
    """One finished run.

    Args:
        run_id: MLflow's.
        started: milliseconds since 1970.
        about: params and tags by key; a tag goes before a param of the same name.
        metrics: last value of every metric that is finite, and of ``experts/<name>`` the mean over the
            layers.
        artifacts: where its files are: a folder, or a URI that MLflow understands.
        params: the keys of ``about`` that are params: the configuration.
    """

    run_id: str
    started: int
    about: dict[str, str]
    metrics: dict[str, float]
    artifacts: str = ""
    params: frozenset[str] = field(default_factory=frozenset)

    @property
    def stream(self) -> str:
        """Name and scenario: what must be the same before anything is averaged."""
        name, scenario = self.about.get("stream", "-"), self.about.get("scenario")
        return f"{name} ({scenario})" if scenario else name

    @property
    def variant(self) -> frozenset[tuple[str, str]]:
        """The stream's settings, and the definitions it was measured by: another one is another stream."""
        settings = {
            (key, value)
            for key, value in self.about.items()
            if key.startswith("stream.") and key not in _NOT_VARIANT
        }
        return frozenset({*settings, ("definitions", self.about.get("definitions", _FIRST_DEFINITIONS))})

    @property
    def num_experiences(self) -> int | None:
        """Of the stream as it was measured; None if no score tells."""
        found = [int(match[1]) for key in self.metrics if (match := _EXPERIENCE.fullmatch(key))]
        return max(found) + 1 if found else None

    @property
    def code(self) -> str:
        """The program's commit, eight digits of it, and whether its checkout was changed since."""
        commit = self.about.get("git_commit", "unknown")
        return commit[:8] + (" changed" if self.about.get("git_dirty") == "true" else "")

    @property
    def seeds(self) -> tuple[str, ...]:
        """The values of ``SEEDS``."""
        return tuple(self.about.get(key, "-") for key in SEEDS)

    def pair(self, context: Sequence[str]) -> Pair:
        """Order, seeds and the values of the groups in ``context``."""
        init, order, data = self.seeds
        values = {key: self.about.get(key, _UNSAID.get(key, "-")) for key in context}
        return Pair(order, (init, data, *(f"{key}={value}" for key, value in values.items())))

    def label(self, keys: Sequence[str]) -> str:
        """The name of the run's group: the bare value for one key, ``key=value`` for several; never empty."""
        if len(keys) == 1:
            name = self.about.get(keys[0], "-")
            return name if name.strip() else "(no name)"
        return ", ".join(f"{key}={self.about.get(key, '-')}" for key in keys)


@dataclass(frozen=True)
class Selection:
    """What was found: runs that count, notes on those that do not, and the experiment's id."""

    runs: list[Run]
    notes: list[str]
    experiment_id: str = ""


def read_runs(client: MlflowClient, experiment: str, sweep: str | None = None) -> Selection:
    """The finished runs of an experiment, oldest first, without those that reproduce another.

    A reproduction has its original's arm and seeds: as the newest it would take the original's place.

    Raises:
        InputError: no such experiment, or no finished run in it (in that sweep).
    """
    from cl_moe.tracking.store import must
    from cl_moe.tracking.sweeps import SWEEP_PARENT

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
    stored = [run for run in stored if SWEEP_PARENT not in run.data.tags]
    sweeps = dict.fromkeys(run.data.tags["sweep"] for run in reversed(stored) if "sweep" in run.data.tags)
    if sweep is not None:
        stored = [run for run in stored if run.data.tags.get("sweep") == sweep]
    again = _arms(run for run in stored if _REPRODUCTION in run.data.tags)
    stored = [run for run in stored if _REPRODUCTION not in run.data.tags]
    finished = [read_run(run) for run in stored if run.info.status == "FINISHED"]
    left = _left_out(stored)
    if not finished:
        where = f"experiment {experiment!r}" + (f" in sweep {sweep!r}" if sweep is not None else "")
        raise InputError(
            got=f"no finished run among the {len(stored)} of {where}" + (f" ({left})" if left else ""),
            allowed="at least one finished run"
            if sweep is None
            else shortened(sweeps, 8) or "no run has one",
            key="--sweep" if sweep is not None else "--experiment",
        )
    notes = [f"Left out, since they are not finished: {left}."] if left else []
    notes += [f"Left out, since they reproduce another run: {again}."] if again else []
    return Selection(finished, notes, found.experiment_id)


def lower_is_better(key: str) -> bool:
    """Which way a metric counts.

    >>> [lower_is_better(key) for key in ("stream/forgetting", "stream/average_accuracy", "cost/seconds")]
    [True, False, True]
    """
    return _LOWER_IS_BETTER.search(key) is not None


def read_run(stored: StoredRun) -> Run:
    """A stored run without what is not finite: NaN, and infinities, which stores cut to the largest float."""
    metrics = {
        key: value
        for key, value in stored.data.metrics.items()
        if math.isfinite(value) and abs(value) < _INFINITE
    }
    layers: dict[str, list[float]] = {}
    for key, value in metrics.items():
        if match := _LAYER.fullmatch(key):
            layers.setdefault(f"experts/{match['name']}", []).append(value)
    metrics |= {key: sum(values) / len(values) for key, values in layers.items()}
    return Run(
        stored.info.run_id,
        stored.info.start_time,
        {**stored.data.params, **stored.data.tags},
        metrics,
        stored.info.artifact_uri,
        frozenset(stored.data.params),
    )


def shortened(names: Iterable[str], most: int = 4) -> str:
    """The first names, and how many more there are.

    >>> shortened("abcdef", 2)
    'a, b and 4 more'
    """
    names = list(names)
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


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


def _left_out(stored: Iterable[StoredRun]) -> str:
    """How many runs failed, were stopped or still run, and of which arms."""
    words = {"FAILED": "failed", "KILLED": "stopped"}
    arms: dict[str, list[StoredRun]] = {}
    for run in stored:
        if run.info.status != "FINISHED":
            arms.setdefault(words.get(run.info.status, "running"), []).append(run)
    return ", ".join(
        f"{len(found)} {status} ({shortened(Counter(map(_arm, found)))})"
        for status, found in sorted(arms.items())
    )


def _arms(runs: Iterable[StoredRun]) -> str:
    """How many runs of which arms: ``naive (2), lwf (1)``."""
    return shortened(f"{arm} ({count})" for arm, count in Counter(map(_arm, runs)).items())


def _arm(run: StoredRun) -> str:
    return run.data.params.get("arm", "-")
