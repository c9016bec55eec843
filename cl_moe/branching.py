"""A child run that starts from a boundary of its parent: what they must share, and how it is found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from cl_moe.arguments import branch_point
from cl_moe.checkpoint import NAME, Branch
from cl_moe.errors import InputError
from cl_moe.schema import CONFIG, leaves, plain
from cl_moe.stream import Stream
from cl_moe.tracking.tracker import RUN_ID_FILE

# In the order in which a difference is named: a model holds its layer, a layer its router.
SHARED = ("seed.order", "stream", "router", "layer", "model")


def parent_of(config: DictConfig, folder: Path) -> Branch | None:
    """Where a configured run starts from, if it is a branch; a run that began already needs no parent.

    Raises:
        InputError: no such parent or boundary, or the two would not share stream and model.
    """
    if config.branch is None:
        return None
    uri = config.tracking.get("uri")
    if (folder / CONFIG).exists():
        name, _, number = config.branch.rpartition("@")
        return Branch(Path(name).absolute(), int(number))
    branch = Branch(*branch_point(config.branch, *([uri] if uri else [])))
    check_boundary(branch)
    _check_shared(config, _stored(branch.folder))
    return branch


def tags(branch: Branch, config: DictConfig) -> dict[str, str]:
    """The parent's run id and the boundary; MLflow's own link where both runs are in one store."""
    file = branch.folder / RUN_ID_FILE
    if not file.is_file():
        return {"branch": f"{branch.folder.name}@{branch.boundary}"}
    run_id = file.read_text().strip()
    labels = {"branch": f"{run_id}@{branch.boundary}"}
    if _stored(branch.folder).tracking.get("uri") == config.tracking.get("uri"):
        labels["mlflow.parentRunId"] = run_id
    return labels


def history(branch: Branch) -> str:
    """``branch@2``, or ``branch@1 branch@3`` for the branch of a branch: part of the arm's name."""
    words = [f"branch@{branch.boundary}"]
    older = _stored(branch.folder).get("branch") if (branch.folder / CONFIG).is_file() else None
    if older:
        name, _, number = older.rpartition("@")
        words.insert(0, history(Branch(Path(name), int(number))))
    return " ".join(words)


def _stored(folder: Path) -> Any:
    return OmegaConf.load(folder / CONFIG)


def check_boundary(branch: Branch, key: str = "branch") -> None:
    """Refuse a boundary that a run does not hold; ``key`` names it."""
    names = [NAME.fullmatch(path.name) for path in (branch.folder / "checkpoints").glob("*.pt")]
    kept = sorted({int(name[1]) for name in names if name and name[2] is None})
    if branch.boundary not in kept:
        raise InputError(
            got=f"{key}=...@{branch.boundary}, a boundary that {branch.folder} does not hold",
            allowed="one that was reached and kept: " + (", ".join(map(str, kept)) or "there is none"),
            key=f"{key} (or checkpoint.keep of the parent)",
        )


def _check_shared(config: DictConfig, parent: DictConfig) -> None:
    mine, theirs = dict(leaves(plain(config))), dict(leaves(plain(parent)))
    written = dict(leaves(plain(config, resolve=False)))
    by_data_seed = False
    for place in SHARED:
        keys = sorted(key for key in {*mine, *theirs} if key == place or key.startswith(f"{place}."))
        for key in keys:
            if mine.get(key) == theirs.get(key):
                continue
            if written.get(key) == "${seed.data}":
                by_data_seed = True  # it may draw nothing of this stream
                continue
            raise InputError(
                got=f"{key}={mine.get(key)!r} in a branch of a run with {theirs.get(key)!r}",
                allowed="the parent's stream, model, layer, router and seed.order",
                key=key,
            )
    # All other keys of the parent's stream, targets included, are equal to ours, which were checked.
    if by_data_seed and not _same_data(instantiate(config.stream), instantiate(parent.stream)):
        raise InputError(
            got=f"seed.data={config.seed.data}, which draws another stream than the parent's",
            allowed=f"seed.data={parent.seed.data}",
            key="seed.data",
        )


def _same_data(one: Stream, other: Stream) -> bool:
    return len(one) == len(other) and all(
        len(mine) == len(theirs) and all(map(torch.equal, mine.tensors, theirs.tensors))
        for a, b in zip(one, other, strict=True)
        for mine, theirs in ((a.train, b.train), (a.test, b.test))
    )
