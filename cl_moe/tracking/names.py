"""The metric keys of the contract, computed from a run's record.

Point i sees rows <= i and the experiences trained by then. What is undefined (NaN) is left out: it is not
logged.

Legend: T experiences, row i: after i experiences, NN: an index padded with zeros to two digits, or to more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import reduce

import torch
from torch import Tensor

import cl_moe.metrics.functional as F  # noqa: N812
from cl_moe.errors import InputError
from cl_moe.layers.routing import ExpertLoad
from cl_moe.stream import is_loss
from cl_moe.tracking.diagnostics import load_metrics, numbered
from cl_moe.tracking.inside import gap_points
from cl_moe.tracking.record import Record

DEFAULT_OBJECTIVE = "stream/average_accuracy"
DEFINITIONS = "1"
"""Version of what the metrics mean, a tag of every run: raise it when a key begins to mean another quantity.
Runs of different versions are never averaged. Runs without the tag are of version 1."""

_CLASSIFICATION: dict[str, Callable[[Tensor], Tensor]] = {
    "stream/average_accuracy": F.average_accuracy,
    "stream/forgetting": F.forgetting,
    "stream/backward_transfer": F.backward_transfer,
    "stream/forward_transfer": F.forward_transfer,
    "stream/average_anytime_accuracy": F.average_anytime_accuracy,
    "stream/learning_accuracy": F.learning_accuracy,
}
# R holds minus the loss, so forgetting has its sign already: positive is a higher loss.
_LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "stream/average_loss": lambda R: -F.average_accuracy(R),
    "stream/forgetting": F.forgetting,
    "stream/backward_transfer": F.backward_transfer,
    "stream/forward_transfer": F.forward_transfer,
    "stream/average_anytime_loss": lambda R: -F.average_anytime_accuracy(R),
    "stream/learning_loss": lambda R: -F.learning_accuracy(R),
}


def stream_points(record: Record, i: int) -> dict[str, float]:
    """Scores, forgetting and transfers at point i, by metric key.

    Every experience's score is there at every point, also before it is trained: R[i, :]. Where scores are
    minus a loss there are losses, and transfers in their unit, and no accuracy key. Language models also give
    perplexities; one that is too large for a float is left out, its loss is there.

    Args:
        record: with at least i + 1 rows.
        i: number of experiences trained, 0 .. ``record.experiences_trained``.

    Raises:
        InputError: the record has no row i.
    """
    losses = is_loss(record.kind)
    seen = F.up_to(record.matrix, i)
    T = len(record.names)
    points: dict[str, float] = {}
    for j, score in enumerate(record.rows[i].double().tolist()):
        name = f"experience_{numbered(j, T)}"
        points[f"{'loss' if losses else 'accuracy'}/{name}"] = -score if losses else score
        if record.kind == "language":
            points[f"perplexity/{name}"] = torch.tensor(-score, dtype=torch.float64).exp().item()
    for j, value in enumerate(F.forgetting_per_experience(seen).tolist()):
        points[f"forgetting/experience_{numbered(j, T)}"] = value
    formulas = _LOSSES if losses else _CLASSIFICATION
    points.update({key: formula(seen).item() for key, formula in formulas.items()})
    if record.cumulative is not None:
        points["stream/intransigence"] = F.intransigence(seen, F.up_to(record.cumulative, i)).item()
    return _defined(points | _decomposition(record, i) | gap_points(record, i))


def _decomposition(record: Record, i: int) -> dict[str, float]:
    """What weights and what routing forgot, in the unit of the scores, where it was measured at point i."""
    if i not in record.rewound:
        return {}
    seen, rewound_T = rewound(record, i)
    points = {
        "stream/forgetting_weights": F.forgetting_weights(seen, rewound_T).item(),
        "stream/forgetting_routing": F.forgetting_routing(seen, rewound_T).item(),
    }
    for part, values in F.decomposed_forgetting(seen, rewound_T)._asdict().items():
        for j, value in enumerate(values.tolist()):
            points[f"forgetting_{part}/experience_{numbered(j, len(record.names))}"] = value
    return points


def rewound(record: Record, i: int) -> tuple[Tensor, Tensor]:
    """R up to row i, and (i,) the scores with the router rolled back: for ``F.decomposed_forgetting``."""
    seen = F.up_to(record.matrix, i)
    return seen, torch.cat([record.rewound[i], seen[-1, -1:]])  # of the newest nothing is past


def expert_points(record: Record, i: int) -> dict[str, float]:
    """Expert loads and growth at point i, by metric key; empty for a model without expert layers.

    Usage, unevenness, entropy and effective experts are of the score-weighted load, Gini, maximal violation
    and the dead share of the counts, each over the evaluation data of the experiences trained so far. At i =
    0 there are none, so only the numbers of experts are given. ``growth/shock`` is there where
    ``record.shocks`` has i.

    Args:
        record: with at least i + 1 rows, loads and cohorts.
        i: number of experiences trained.

    Raises:
        InputError: the record has no row i.
    """
    _check_row(record, i)
    points: dict[str, float] = {}
    cohorts = record.cohorts[i] if i < len(record.cohorts) else {}
    for layer, members in cohorts.items():
        prefix = f"experts/layer_{numbered(layer)}"
        points[f"{prefix}/num_experts"] = float(sum(size for size, _, _ in members))
        points[f"{prefix}/num_frozen"] = float(sum(size for size, _, frozen in members if frozen))
    points.update(record.points[i] if i < len(record.points) else load_metrics(record, i))
    if cohorts:
        points["growth/num_experts"] = float(sum(size for row in cohorts.values() for size, _, _ in row))
    if i in record.shocks:
        points["growth/shock"] = record.shocks[i]
    return _defined(points)


def decision_points(record: Record, i: int) -> dict[str, float]:
    """What was decided before the experience that followed point i, where data decided.

    ``growth/<measure>_statistic`` and ``_threshold``; for drift also ``_effect``, for a plateau ``_loss``; of
    all layers the experts that started anew (``growth/num_recycled``) and the cohorts that were pruned.
    """
    points: dict[str, float] = {}
    for event in record.ledger:
        if event["experience"] != i:
            continue
        if "measure" in event:
            for name in {"statistic", "threshold", "effect", "loss"}.intersection(event):
                points[f"growth/{event['measure']}_{name}"] = float(event[name])
        for act, key in (("recycle", "experts"), ("prune", "cohorts")):
            if event["act"] == act:
                name = "growth/num_recycled" if act == "recycle" else "growth/num_pruned_cohorts"
                points[name] = points.get(name, 0.0) + len(event[key])
    return points


def depth_points(record: Record, i: int) -> dict[str, float]:
    """Share of real tokens that went through each block at depth, over the experiences trained by point i.

    ``depth/layer_NN/share``, NN the block's index; beside the expert metrics, since passing a block by is no
    choice among experts.
    """
    rows = record.depths[i] if 0 < i < len(record.depths) else {}
    merged = {block: reduce(ExpertLoad.merge, loads[:i]) for block, loads in rows.items()}
    return _defined(
        {
            f"depth/layer_{numbered(block)}/share": (load.kept / load.count.sum()).item()
            for block, load in merged.items()
        }
    )


def all_points(record: Record, i: int) -> dict[str, float]:
    """Everything of point i: scores, experts, depth, and what was decided there."""
    known = stream_points(record, i) | expert_points(record, i) | depth_points(record, i)
    return known | decision_points(record, i)


def objective(
    record: Record, name: str = DEFAULT_OBJECTIVE, others: Mapping[str, float] | None = None
) -> float:
    """The number that a sweeper is given: a metric's value at the last point.

    Where scores are minus a loss, the default name means minus ``stream/average_loss``, so that higher is
    better there too.

    Args:
        record: of the run, finished or not.
        name: a metric key.
        others: further metrics that may be named (costs, say), ``{key: value}``.

    Raises:
        InputError: no such metric, or it is undefined for this run.
    """
    last = record.experiences_trained
    points = {**(others or {}), **all_points(record, last)}
    if is_loss(record.kind) and "stream/average_loss" in points:
        points[DEFAULT_OBJECTIVE] = -points["stream/average_loss"]
    if name not in points or not math.isfinite(points[name]):
        raise InputError(
            got=f"objective={name!r}, which this run does not define",
            allowed=", ".join(sorted(points)) or "nothing: no experience was trained",
            key="objective",
        )
    return points[name]


def _check_row(record: Record, i: int) -> None:
    """Refuse a point that was not measured."""
    if not 0 <= i <= record.experiences_trained:
        raise InputError(
            got=f"i = {i}", allowed=f"0 .. {record.experiences_trained}, the rows so far", key="i"
        )


def _defined(points: dict[str, float]) -> dict[str, float]:
    """Without NaN and infinity: the store keeps neither as what it is."""
    return {key: value for key, value in points.items() if math.isfinite(value)}
