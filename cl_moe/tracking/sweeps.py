"""The runs of one sweep in MLflow: one parent above them, and charts that show what is below it.

The parent holds neither params nor metrics, and not the tag ``sweep``: whoever counts or groups runs finds
the jobs. It is known by a token in the sweep's folder, so that jobs that start together, or one that is
resumed a week later, find the same one, and a store that begins anew gets its own.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from cl_moe.files import regular, write_atomically
from cl_moe.tracking.colours import COLOUR, GREY, own_colour

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

PARENT = "mlflow.parentRunId"
SWEEP_PARENT = "sweep_parent"
"""The tag that a sweep's parent has, and no other run."""
TOKEN_FILE = "mlflow_sweep"
VIEWS = {"arms": True, "runs": False}
"""The prepared chart views (``#/experiments/1/runs?compareRunsMode=CHART&viewStateShareKey=arms``), and
whether they draw groups."""
_LOCK_SECONDS = 300.0  # as for a fresh store
_WORST_FIRST = ("RUNNING", "FAILED", "KILLED")


@contextmanager
def place(
    client: MlflowClient, experiment: str, folder: Path | None, tags: Mapping[str, str], arm: str
) -> Iterator[dict[str, str]]:
    """The tags of a run to be made: below its sweep's parent, in the colour of its arm.

    Args:
        client: of the store.
        experiment: id of the MLflow experiment.
        folder: of the sweep; None for a run on its own.
        tags: of the run. One that has a parent already, as a branch has, keeps it.
        arm: of the run.

    Yields:
        The tags; the run is made in the block, while other jobs of the sweep wait.
    """
    if folder is None or PARENT in tags:
        yield {**tags, COLOUR: own_colour(client, experiment, None, arm)} if arm else dict(tags)
        return
    from filelock import FileLock

    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f".{TOKEN_FILE}.lock", timeout=_LOCK_SECONDS):
        parent = _parent(client, experiment, folder, tags.get("sweep", folder.name))
        if parent.info.status != "RUNNING":
            client.update_run(parent.info.run_id, status="RUNNING")
        yield {**tags, PARENT: parent.info.run_id, COLOUR: own_colour(client, experiment, parent, arm)}


def settle(client: MlflowClient, run_id: str) -> None:
    """Gives the parent of a run the status of its sweep: running, or the worst of its jobs'.

    Every job does so as it ends, and as it goes on. A job that was killed counts as running, as MLflow shows
    it, until it is resumed.
    """
    from cl_moe.tracking.store import lookup

    run = lookup(client, run_id)
    parent = lookup(client, run.data.tags[PARENT]) if run is not None and PARENT in run.data.tags else None
    if run is None or parent is None or SWEEP_PARENT not in parent.data.tags:
        return
    below = f"tags.`{PARENT}` = '{parent.info.run_id}'"
    for status in _WORST_FIRST:
        found = f"{below} and attributes.status = '{status}'"
        if client.search_runs([run.info.experiment_id], found, max_results=1):
            break
    else:
        status = "FINISHED"
    if status == "RUNNING":
        client.update_run(parent.info.run_id, status=status)
    else:
        client.set_terminated(parent.info.run_id, status)


def offer_views(client: MlflowClient, experiment: str) -> None:
    """Prepares chart views of the experiment, grouped by arm; one that is there stays as it is.

    MLflow folds the jobs of a sweep away below their parent, and draws what is not folded away: nothing. In
    groups it draws them all: ``arms`` as their means and bands, in colours of MLflow's choice, ``runs`` one
    by one, each in the colour of its arm.
    """
    known = client.get_experiment(experiment).tags
    group = {"aggregateFunction": "average", "groupByKeys": [{"mode": "param", "groupByData": "arm"}]}
    for name, grouped in VIEWS.items():
        key = f"mlflow.sharedViewState.{name}"
        state = {"groupBy": group, "runsHiddenMode": "FIRST_20_RUNS", "useGroupedValuesInCharts": grouped}
        if key not in known:
            client.set_experiment_tag(experiment, key, json.dumps(state))


def _parent(client: MlflowClient, experiment: str, folder: Path, name: str) -> Run:
    """The sweep's parent in this experiment, made if it is not there."""
    token = _token(folder / TOKEN_FILE)
    made = client.search_runs([experiment], f"tags.{SWEEP_PARENT} = '{token}'", max_results=1)
    if made:
        return made[0]
    return client.create_run(experiment, run_name=name, tags={SWEEP_PARENT: token, COLOUR: GREY})


def _token(file: Path) -> str:
    """What the parent is known by; it goes to the disk before MLflow hears of it."""
    if file.is_file() and not file.is_symlink():
        with open(file, "rb", opener=regular) as opened:
            text = opened.read(100).decode(errors="replace").strip()
        if re.fullmatch("[0-9a-f]{32}", text):
            return text
    token = secrets.token_hex(16)
    write_atomically(file, f"{token}\n".encode())
    return token
