"""What a run prints: a line after every experience, and a table at the end, both within 80 columns."""

from __future__ import annotations

import math
from collections.abc import Mapping

from rich.table import Table
from rich.text import Text

from cl_moe.memory import readable
from cl_moe.metrics.functional import forgetting_per_experience, up_to
from cl_moe.stream import UNITS, is_loss
from cl_moe.tracking.names import expert_points, stream_points
from cl_moe.tracking.record import Record

_STREAM = (
    ("average accuracy", "stream/average_accuracy"),
    ("average loss", "stream/average_loss"),
    ("forgetting", "stream/forgetting"),
    ("backward transfer", "stream/backward_transfer"),
    ("forward transfer", "stream/forward_transfer"),
    ("anytime accuracy", "stream/average_anytime_accuracy"),
    ("anytime loss", "stream/average_anytime_loss"),
    ("learning accuracy", "stream/learning_accuracy"),
    ("learning loss", "stream/learning_loss"),
)
_COST = (
    ("seconds", "cost/seconds", "{:,.1f}"),
    ("tokens/s", "cost/tokens_per_second", "{:,.0f}"),
    ("parameters", "cost/params_total", "{:,.0f}"),
    ("active", "cost/params_active", "{:,.0f}"),
    ("trainable", "cost/params_trainable", "{:,.0f}"),
    ("training", "cost/train_flops", "FLOPs"),
    ("evaluation", "cost/eval_flops", "FLOPs"),
    ("a token", "cost/inference_flops_per_token", "FLOPs"),
    ("peak memory", "cost/peak_memory_bytes", "bytes"),
    ("weights", "cost/param_bytes", "bytes"),
    ("optimizer", "cost/optimizer_bytes", "bytes"),
    ("buffers", "cost/buffer_bytes", "bytes"),
)
_WIDTH = 76
_PREFIXES = ("", "k", "M", "G", "T", "P", "E")


def boundary_line(record: Record, i: int) -> str:
    """One line on point i: the score on the newest experience, the average so far, forgetting, experts.

    Raises:
        InputError: the record has no row i.
    """
    points = stream_points(record, i)
    what = "loss" if is_loss(record.kind) else "accuracy"
    if i == 0:
        mean = _sign(record) * record.rows[0].mean().item()
        parts = ["before training" + ("" if math.isnan(mean) else f": mean {what} {mean:.3f}")]
    else:
        newest = _sign(record) * record.rows[i][i - 1].item()
        parts = [f"{i}/{len(record.names)} {_cut(record.names[i - 1], 24)}: {what} {newest:.3f}"]
        parts.append(f"average {points[f'stream/average_{what}']:.3f}")
        if "stream/forgetting" in points:
            parts.append(f"forgetting {points['stream/forgetting']:.3f}")
    experts = expert_points(record, i).get("growth/num_experts")
    # What does not fit into a line stands indented in the next.
    return "\n    ".join(_packed([*parts, *([f"{experts:,.0f} experts"] if experts else [])]))


def run_table(record: Record, costs: Mapping[str, float] | None = None) -> Table:
    """The end of a run: a row per experience, then the stream's metrics, the experts and the cost.

    Args:
        record: of the run; it need not have reached its last experience.
        costs: ``cost/*`` metrics, by key; those known here are shown.
    """
    last = record.experiences_trained
    what = f"Loss ({UNITS[record.kind]})" if is_loss(record.kind) else "Accuracy"
    title = f"{what} after {last} of {len(record.names)} experiences"
    table = Table(title=title, title_justify="left", min_width=_WIDTH)
    table.add_column("experience", max_width=34, overflow="ellipsis", no_wrap=True)
    for name in ("before", "learnt", "final", "forgetting"):
        table.add_column(name, justify="right", no_wrap=True)
    forgotten = forgetting_per_experience(up_to(record.matrix, last)).tolist()
    for j, name in enumerate(record.names):
        before, final = record.rows[0][j].item(), record.rows[-1][j].item()
        learnt = record.rows[j + 1][j].item() if j < last else float("nan")
        shown = [_sign(record) * score for score in (before, learnt, final)]
        loss = forgotten[j] if j < last else float("nan")
        # Text, not markup: a name may hold square brackets.
        table.add_row(Text(name), *(_number(value) for value in shown), _number(loss, "+.3f"))
    notes = [*_stream_notes(record), *_expert_notes(record), *_cost_notes(costs or {})]
    table.caption = Text("\n".join(notes), style="default", justify="left")
    table.caption_justify = "left"
    return table


def _stream_notes(record: Record) -> list[str]:
    points = stream_points(record, record.experiences_trained)
    return _packed([f"{words} {points[key]:.3f}" for words, key in _STREAM if key in points])


def _expert_notes(record: Record) -> list[str]:
    """A line per expert layer: how many, how many of them frozen, usage and unevenness."""
    points = expert_points(record, record.experiences_trained)
    lines = []
    for prefix in dict.fromkeys(key.rsplit("/", 1)[0] for key in points if key.startswith("experts/")):
        known = [
            (f"{points[f'{prefix}/{name}']:{form}}", words)
            for name, words, form in (
                ("num_experts", "experts", ",.0f"),
                ("num_frozen", "frozen", ",.0f"),
                ("usage", "used", ".1%"),
                ("unevenness", "nats uneven", ".3f"),
                ("drop_rate", "dropped", ".1%"),
            )
            if f"{prefix}/{name}" in points
        ]
        first, *rest = [f"{value} {words}" for value, words in known]
        lines += _packed([f"{prefix.split('/')[1]}: {first}", *rest])
    return lines


def _cost_notes(costs: Mapping[str, float]) -> list[str]:
    return _packed([f"{words} {_amount(costs[key], form)}" for words, key, form in _COST if key in costs])


def _amount(value: float, form: str) -> str:
    """A number, operations or bytes in the unit that suits them.

    >>> _amount(1234.5, "{:,.0f}"), _amount(2.5e12, "FLOPs"), _amount(12, "FLOPs"), _amount(2**20, "bytes")
    ('1,234', '2.5 TFLOPs', '12 FLOPs', '1.0 MiB')
    """
    if form == "bytes":
        return readable(int(value))
    if form != "FLOPs":
        return form.format(value)
    power = min(max(int(math.log10(value)) // 3, 0), len(_PREFIXES) - 1) if value >= 1 else 0
    return f"{value / 1000**power:,.{1 if power else 0}f} {_PREFIXES[power]}FLOPs"


def _packed(parts: list[str], width: int = _WIDTH) -> list[str]:
    """Parts joined by commas into lines that fit."""
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + len(part) + 2 <= width:
            lines[-1] += f", {part}"
        else:
            lines.append(part)
    return lines


def _sign(record: Record) -> int:
    """What holds minus a loss shows the loss."""
    return -1 if is_loss(record.kind) else 1


def _number(value: float, form: str = ".3f") -> str:
    """A number, or a dash where it is undefined."""
    return "-" if value != value else f"{value:{form}}"


def _cut(name: str, width: int) -> str:
    return name if len(name) <= width else f"{name[: width - 1]}…"
