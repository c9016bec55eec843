"""Other runs that a run refers to: the parent of a branch, and the cumulative run to compare with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from cl_moe import checkpoint
from cl_moe.arguments import CUMULATIVE, branch_point, run_folder
from cl_moe.checkpoint import Branch
from cl_moe.errors import InputError
from cl_moe.folder import CONFIG, fixed, read_config, store_of
from cl_moe.schema import leaves, plain
from cl_moe.tracking.tracker import RUN_ID_FILE

# In the order in which a difference is named: a model holds its layer, a layer its router.
SHARED = ("seed.order", "stream", "router", "layer", "model")
REPLACED = ("router.", "layer.", "model.layer.")
"""What is the child's own where its experts start as copies; ``Upcycled`` refuses what cannot be copied."""


def parent_of(config: DictConfig, folder: Path) -> Branch | None:
    """Where a configured run starts from, if it is a branch; a run that began already needs no parent.

    Raises:
        InputError: no such parent or boundary, or the two are not configured to share stream and model.
    """
    if config.branch is None:
        return None
    uri = config.tracking.get("uri")
    if (folder / CONFIG).exists():
        name, _, number = config.branch.rpartition("@")
        return Branch(Path(name).absolute(), int(number))
    branch = Branch(*branch_point(config.branch, *([uri] if uri else [])))
    check_boundary(branch)
    _check_shared(config, read_config(branch.folder, "branch"))
    return branch


def tags(branch: Branch, config: DictConfig) -> dict[str, str]:
    """The parent's run id and the boundary; MLflow's own link where both runs are in one store."""
    file = branch.folder / RUN_ID_FILE
    if not file.is_file():
        return {"branch": f"{branch.folder.name}@{branch.boundary}"}
    run_id = file.read_text().strip()
    labels = {"branch": f"{run_id}@{branch.boundary}"}
    if _store(branch.folder) == fixed(config.tracking.get("uri")):
        labels["mlflow.parentRunId"] = run_id
    return labels


def history(branch: Branch) -> str:
    """``branch@2``, or ``branch@1 branch@3`` for the branch of a branch: part of the arm's name."""
    words, folder, seen = [f"branch@{branch.boundary}"], branch.folder, set[Path]()
    while folder not in seen and (folder / CONFIG).is_file():
        seen.add(folder)  # a damaged folder may name itself
        name, at, number = str(read_config(folder, "branch").get("branch") or "").rpartition("@")
        if not at:
            break
        words.insert(0, f"branch@{number}")
        folder = Path(name)
    return " ".join(words)


def cumulative_matrix(config: DictConfig, learnt: object) -> Tensor | None:
    """(T + 1, T) accuracy matrix of the cumulative run that a configuration names, if it names one.

    Args:
        config: of a run.
        learnt: the fingerprint of its stream: names of the experiences in order, and their data.

    Raises:
        InputError: no such run, it learnt another stream or in another way, or it has not finished.
    """
    if config.eval.cumulative is None:
        return None
    uri = config.tracking.get("uri")
    folder = run_folder(config.eval.cumulative, *([uri] if uri else []), key=CUMULATIVE)
    if "cumulative" not in (read_config(folder, CUMULATIVE).get("strategy") or {}):
        got = "a run without strategy=cumulative"
    else:
        state = checkpoint.newest(folder / "checkpoints") or {}
        rows = state.get("record", {}).get("rows", [])
        if not rows:
            got = "a run that has saved nothing"
        elif state.get("fingerprint", {}).get("stream") != learnt:
            got = "a run of other experiences, data or order"
        elif len(rows) != len(rows[0]) + 1:
            got = f"a run that is at {len(rows) - 1} of its {len(rows[0])} experiences"
        else:
            return torch.stack(rows)
    raise InputError(
        got=f"{CUMULATIVE}={folder}, {got}",
        allowed="a finished run of the same stream in the same order, with strategy=cumulative",
        key=CUMULATIVE,
    )


def _store(folder: Path) -> str | None:
    """The store of the run in a folder, named independently of the working folder."""
    tracking = read_config(folder, "branch").get("tracking")
    uri = tracking.get("uri") if isinstance(tracking, dict) else None
    return store_of(folder, "branch") or fixed(uri if isinstance(uri, str) else None)


def check_boundary(branch: Branch, key: str = "branch") -> None:
    """Refuse a boundary that a run does not hold; ``key`` names it."""
    kept = checkpoint.boundaries(branch.folder)
    if branch.boundary not in kept:
        raise InputError(
            got=f"{key}=...@{branch.boundary}, a boundary that {branch.folder} does not hold",
            allowed="one that was reached and kept: " + (", ".join(map(str, kept)) or "there is none"),
            key=f"{key} (or checkpoint.keep of the parent)",
        )


def _check_shared(config: DictConfig, parent: dict[Any, Any]) -> None:
    mine, theirs = dict(leaves(plain(config))), dict(leaves(parent))
    written = dict(leaves(plain(config, resolve=False)))
    for place in SHARED:
        keys = sorted(key for key in {*mine, *theirs} if key == place or key.startswith(f"{place}."))
        for key in keys:
            if mine.get(key) == theirs.get(key) or (config.upcycle and key.startswith(REPLACED)):
                continue
            if written.get(key) == "${seed.data}":
                continue  # it may draw nothing of this stream; if it does, the checkpoint is of other data
            allowed = "the parent's stream, model, layer, router and seed.order"
            if key.startswith(REPLACED) and str(theirs.get("layer._target_")).endswith(".DenseFFN"):
                allowed += (
                    "; or upcycle=true for layer=moe, whose experts start as copies of the dense layers"
                )
            raise InputError(
                got=f"{key}={mine.get(key)!r} in a branch of a run with {theirs.get(key)!r}",
                allowed=allowed,
                key=key,
            )
