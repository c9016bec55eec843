"""Colours of arms in MLflow's charts: one for each, the same in all runs of an experiment.

MLflow reads the tag ``mlflow.runColor`` where it draws runs. Groups of runs get colours of its own choice, a
hash of their names into 29, which no tag and no view changes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

COLOUR = "mlflow.runColor"
GREY = "#bbbbbb"
_IN_EXPERIMENT, _IN_SWEEP = "arm_colours", "sweep_colours"  # tags: {digest of an arm: its colour}
# Paul Tol's "muted" scheme: told apart with any common colour blindness
_FIRST = ["#332288", "#88ccee", "#44aa99", "#117733", "#999933", "#ddcc77", "#cc6677", "#882255", "#aa4499"]
_ALL = [*_FIRST, "#ee7733", "#0077bb", "#cc3311", "#000000"]  # and some of his "vibrant" one


def colour(arm: str) -> str:
    """The colour of an arm if it is free: the same in every experiment and on every machine.

    >>> colour("naive") == colour("naive")
    True
    """
    return _FIRST[int.from_bytes(_digest(arm)[:4]) % len(_FIRST)]


def own_colour(client: MlflowClient, experiment: str, parent: Run | None, arm: str) -> str:
    """The arm's colour in the experiment; a new arm gets one that no other has, while there are such.

    Where the experiment has used up all, one that no other arm of the sweep has; else ``colour``.

    Args:
        client: of the store.
        experiment: id of the MLflow experiment.
        parent: of the sweep; None for a run on its own.
        arm: its name.
    """
    key = _digest(arm).hex()[:8]
    known = _read(client.get_experiment(experiment).tags, _IN_EXPERIMENT)
    beside = {} if parent is None else _read(client.get_run(parent.info.run_id).data.tags, _IN_SWEEP)
    if key in beside or key in known:
        return beside.get(key, known.get(key, ""))
    begin = _FIRST.index(colour(arm))
    order = [*_FIRST[begin:], *_FIRST[:begin], *_ALL[len(_FIRST) :]]
    new = [one for one in order if one not in known.values()]
    unlike = [one for one in order if one not in beside.values()]
    chosen = (new or unlike or [colour(arm)])[0]
    if new:
        client.set_experiment_tag(experiment, _IN_EXPERIMENT, json.dumps({**known, key: chosen}))
    if parent is not None and unlike:
        client.set_tag(parent.info.run_id, _IN_SWEEP, json.dumps({**beside, key: chosen}))
    return chosen


def _read(tags: Mapping[str, str], name: str) -> dict[str, str]:
    """What a tag remembers; nothing if it is damaged."""
    try:
        return {str(key): str(value) for key, value in dict(json.loads(tags.get(name, "{}"))).items()}
    except (ValueError, TypeError):
        return {}


def _digest(arm: str) -> bytes:
    return hashlib.sha256(arm.encode(errors="replace")).digest()
