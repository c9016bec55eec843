"""Metric keys of loads and choices: computed once, while those are there, and kept in ``Record.points``.

Legend: T experiences, N experts of a layer, C cohorts, NN: an index padded to two digits, or to more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor

import cl_moe.metrics.functional as F  # noqa: N812
from cl_moe.layers.routing import ExpertLoad
from cl_moe.metrics.functional import Choices
from cl_moe.tracking.record import Record

_OF_SCORE: dict[str, Callable[[Tensor], Tensor]] = {
    "usage": F.usage,
    "unevenness": F.unevenness,
    "entropy": F.normalized_entropy,
    "effective_experts": F.effective_experts,
}
_OF_COUNT: dict[str, Callable[[Tensor], Tensor]] = {
    "gini": F.gini,
    "max_violation": F.max_violation,
    "dead_fraction": F.dead_fraction,
    "squared_cv": F.squared_cv,
}


def numbered(index: int, total: int = 0) -> str:
    """``index`` as it stands in a key: two digits, or as many as the largest of ``total`` indices needs.

    >>> numbered(3), numbered(3, total=120)
    ('03', '003')
    """
    return f"{index:0{max(2, len(str(max(total - 1, 0))))}d}"


def load_metrics(record: Record, i: int) -> dict[str, float]:
    """What loads say at point i, over the experiences trained by then; some of it NaN, nothing at i = 0.

    Per layer: evenness (``experts/...``), the share of routed weight that each cohort takes (where there are
    several), the leak to experts born later, and what an expert tells of the experience.

    Args:
        record: with loads, cohorts and shares of row i.
        i: number of experiences trained.
    """
    points: dict[str, float] = {}
    for layer, load in seen_loads(record, i).items():
        experts, routing = f"experts/layer_{numbered(layer)}", f"routing/layer_{numbered(layer)}"
        points.update({f"{experts}/{name}": value for name, value in load_points(load).items()})
        if load.count.numel() == 0:
            continue
        sizes, births, _ = zip(*cohorts_of(record, i, layer, load.count.numel()), strict=True)
        if len(sizes) > 1:
            for cohort, share in enumerate(
                F.cohort_shares(load.score.unsqueeze(0), sizes).squeeze(1).tolist()
            ):
                points[f"{experts}/load_cohort_{numbered(cohort, len(sizes))}"] = share
        share_CT = F.cohort_shares(_stacked(record, i, layer, "score"), sizes)
        points[f"{routing}/leak"] = F.leak(share_CT, births).item()
        points[f"{routing}/task_information"] = F.task_information(_stacked(record, i, layer, "count")).item()
    return points


def load_points(load: ExpertLoad) -> dict[str, float]:
    """The load metrics of one layer, by the last part of their keys; undefined ones are NaN."""
    points = {name: formula(load.score).item() for name, formula in _OF_SCORE.items()}
    points |= {name: formula(load.count).item() for name, formula in _OF_COUNT.items()}
    points["drop_rate"] = F.drop_rate(load.kept, load.count.sum()).item()
    return points


def latencies(peaks: Mapping[int, Tensor], i: int) -> dict[str, float]:
    """``experts/layer_NN/latency``: mean over the batches of the experiences trained (see ``PeakLoads``).

    Args:
        peaks: ``{layer: (T, 2)}``, sum over batches and number of batches.
        i: number of experiences trained.
    """
    sums = {layer: peaks_T2[:i].sum(dim=0).tolist() for layer, peaks_T2 in peaks.items()}
    return {
        f"experts/layer_{numbered(layer)}/latency": quotients / batches
        for layer, (quotients, batches) in sums.items()
        if batches
    }


def changes(
    now: Sequence[Mapping[int, Choices]], then: Mapping[int, Mapping[int, Choices]], T: int
) -> dict[str, float]:
    """Drift and saturation of each experience trained, per layer: choices of now against those of its end.

    Args:
        now: choices on the probe set of every experience, by layer.
        then: those at the end of an experience, by experience and layer; of another number of examples, as a
            branch may have, they are left out.
        T: experiences of the stream.
    """
    points = {}
    for j, rows in then.items():
        for layer, before in rows.items():
            after = now[j].get(layer)
            if after is None or after.size.shape != before.size.shape:
                continue
            prefix, name = f"routing/layer_{numbered(layer)}", f"experience_{numbered(j, T)}"
            points[f"{prefix}/drift_{name}"] = F.routing_drift(after, before).item()
            points[f"{prefix}/saturation_{name}"] = F.router_saturation(after, before).item()
    return points


def takers(choices: Sequence[Mapping[int, Choices]], layers: Iterable[int]) -> dict[str, float]:
    """How many experts compute a token: shares of the probe sets' tokens, per layer.

    ``experts/layer_NN/tokens_none``, ``tokens_one_two``, ``tokens_three_four``, ``tokens_more``.

    Args:
        choices: on the probe set of every experience trained, by layer.
        layers: in which that number is not the same for all tokens.
    """
    points: dict[str, float] = {}
    for layer in layers:
        found = [row[layer] for row in choices if layer in row]
        values = F.taker_shares(found).tolist() if found else []
        names = ("none", "one_two", "three_four", "more")
        points |= {
            f"experts/layer_{numbered(layer)}/tokens_{n}": v for n, v in zip(names, values, strict=False)
        }
    return points


def shares(record: Record, i: int) -> dict[int, Tensor]:
    """Per layer (C, T): the share of each experience's routed weight that goes to each cohort at row i."""
    found = {}
    for layer, loads in record.loads[i].items():
        if loads and loads[0].score.numel():
            members = cohorts_of(record, i, layer, loads[0].score.numel())
            score_TN = torch.stack([load.score for load in loads])
            found[layer] = F.cohort_shares(score_TN, [size for size, _, _ in members]).cpu()
    return found


def seen_loads(record: Record, i: int) -> dict[int, ExpertLoad]:
    """Load of every expert layer on the data of experiences < i, measured with row i; {} at i = 0."""
    if i == 0 or i >= len(record.loads):
        return {}
    return {
        layer: reduce(ExpertLoad.merge, loads[:i]) for layer, loads in record.loads[i].items() if loads[:i]
    }


def cohorts_of(record: Record, i: int, layer: int, num_experts: int) -> list[tuple[int, int, bool]]:
    """The layer's cohorts at row i; a layer without cohorts counts as one of them."""
    known = record.cohorts[i].get(layer) if i < len(record.cohorts) else None
    return known or [(num_experts, 0, False)]


def _stacked(record: Record, i: int, layer: int, part: str) -> Tensor:
    """(i, N) scores or counts on the experiences trained."""
    return torch.stack([getattr(load, part) for load in record.loads[i][layer][:i]])
