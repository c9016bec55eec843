"""The numbers of ``report.html``, as plain data for JSON.

Legend: S runs of an arm, T experiences, R (T + 1, T), N experts of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cl_moe.tracking.compare.arms import kind_of
from cl_moe.tracking.compare.figures import by_arm, common_names, forgetting_split, tradeoffs

if TYPE_CHECKING:
    from cl_moe.tracking.compare.whole import View

MOST_ROWS = 64
"""Beyond so many experts a heat map shows groups of them, sorted by load."""

_DASHES = {"-": "", "--": "7 4", ":": "2 3", "-.": "8 3 2 3"}


def stream_data(view: View) -> dict[str, Any]:
    """Everything that the page draws of one stream: arms by place, curves, matrices, loads, Pareto, parts."""
    from cl_moe.tracking.figures import style

    arms = [row.arm for row in view.comparison.rows]
    looks = style.line_styles(arms)
    look = style.scale(kind_of(view.arms))
    better = "lower" if look.sign < 0 else "higher"
    pareto, parts = tradeoffs(view.arms), forgetting_split(view.arms)
    data: dict[str, Any] = {
        "arms": [{"name": arm, "colour": looks[arm][0], "dash": _DASHES[looks[arm][1]]} for arm in arms],
        "pareto": {
            "label": f"{look.label.split(' (')[0]} just after learning ({better} is better)",
            "arms": [[_round(point) for point in pareto[arm]] for arm in arms],
        },
        "parts": [_round(parts[arm]) if arm in parts else None for arm in arms] if parts else None,
        "curves": None,
        "matrices": None,
        "loads": _loads(view, arms) or None,
    }
    if view.left:
        shown = {arm: look.sign * np.stack(matrices) for arm, matrices in by_arm(view.left).items()}
        names = common_names(view.left) or [f"experience {j + 1}" for j in range(_num(shown))]
        data["curves"] = {
            "label": look.label,
            "lower": look.sign < 0,
            "floor": 0,
            "experiences": names,
            "panels": _panels(shown, arms, names),
        }
        means = {arm: stack.mean(axis=0) for arm, stack in shown.items()}
        data["matrices"] = [
            {"arm": arms.index(arm), "rows": [_round(row) for row in mean]} for arm, mean in means.items()
        ]
        both = np.stack(list(means.values()))
        low, high = look.limits or (both.min(), both.max())
        data["scale"] = {"low": _round([low])[0], "high": _round([high])[0]}
    return data


def _panels(stacks: dict[str, np.ndarray], arms: Sequence[str], names: Sequence[str]) -> list[dict[str, Any]]:
    """The average over the experiences trained, then every experience: a curve with a band per arm."""
    from cl_moe.tracking.figures.matrix import seen_average

    averages = {arm: np.stack([seen_average(R) for R in stack])[:, 1:] for arm, stack in stacks.items()}
    first = {
        "name": "average over the experiences trained",
        "series": [_curve(arms.index(arm), values, 1) for arm, values in averages.items()],
    }
    others = [
        {
            "name": f"{j + 1}: {name}",
            "series": [_curve(arms.index(arm), stack[:, :, j], 0) for arm, stack in stacks.items()],
        }
        for j, name in enumerate(names)
    ]
    return [first, *others]


def _curve(arm: int, values_SX: np.ndarray, start: int) -> dict[str, Any]:
    """Mean and band of one standard deviation, within what was measured."""
    mean_X = values_SX.mean(axis=0)
    std_X = values_SX.std(axis=0, ddof=1) if len(values_SX) > 1 else np.zeros_like(mean_X)
    return {
        "arm": arm,
        "start": start,
        "runs": len(values_SX),
        "mean": _round(mean_X),
        "low": _round(np.maximum(mean_X - std_X, values_SX.min(axis=0))),
        "high": _round(np.minimum(mean_X + std_X, values_SX.max(axis=0))),
    }


def _loads(view: View, arms: Sequence[str]) -> list[dict[str, Any]]:
    """A heat map per arm and layer, of the arm's first run: experts of other seeds are other experts."""
    maps, seen = [], set()
    for run in sorted(view.left, key=lambda run: arms.index(run.arm)):
        if run.arm in seen or not run.loads:
            continue
        seen.add(run.arm)
        for layer, load_NT in sorted(run.loads.items()):
            rows, experts, across = _load_rows(load_NT)
            title = f"{run.arm}, block {layer} (seeds {'.'.join(run.run.seeds)})"
            experiences = [f"evaluated on {name}" for name in run.matrix.names]
            maps.append(
                {
                    "name": title,
                    "rows": rows,
                    "first": 0 if len(rows) == len(load_NT) else 1,  # ids begin at 0, groups at 1
                    "experts": experts,
                    "across": across,
                    "experiences": experiences,
                }
            )
    return maps


def _load_rows(load_NT: np.ndarray) -> tuple[list[list[float | None]], list[str], str]:
    """Loads in units of an even share: a row per expert, or per group of experts of about the same load."""
    with np.errstate(invalid="ignore"):
        relative_NT = load_NT / load_NT.sum(axis=0) * len(load_NT)
    if len(relative_NT) <= MOST_ROWS:
        names = [f"expert {n}" for n in range(len(relative_NT))]
        return [_round(row) for row in relative_NT], names, "experience; rows: experts"
    order = np.argsort(-load_NT.sum(axis=1), kind="stable")
    groups = np.array_split(order, MOST_ROWS)
    names = [f"{len(group)} experts, group {k + 1} of {MOST_ROWS} by load" for k, group in enumerate(groups)]
    rows = [_round(relative_NT[group].mean(axis=0)) for group in groups]
    return rows, names, f"experience; rows: {MOST_ROWS} groups of experts, the busiest first"


def _num(stacks: dict[str, np.ndarray]) -> int:
    return int(next(iter(stacks.values())).shape[2])


def _round(values: Sequence[float] | np.ndarray) -> list[float | None]:
    """Six digits; what is not finite is null."""
    return [float(f"{value:.6g}") if np.isfinite(value) else None for value in values]
