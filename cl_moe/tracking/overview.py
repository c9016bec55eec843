"""What is in a stream: sizes, classes or targets, samples; for people before training, and left by a run.

Legend: n examples, S tokens, N images, c channels, H height, W width.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cl_moe.batches import is_asked
from cl_moe.files import write_atomically
from cl_moe.stream import Experience, Stream, Streamed
from cl_moe.tracking.figures.samples import contact_sheet
from cl_moe.tracking.figures.style import save

SAMPLES = 10
"""Examples shown of each experience."""
_LETTERS = 300


def describe(stream: Stream) -> dict[str, Any]:
    """Sizes of every experience, and counts of its classes or tokens, or its targets' mean and spread."""
    return {
        "stream": stream.name,
        "kind": stream.kind,
        "scenario": stream.scenario,
        "num_classes": stream.num_classes,
        "input_shape": list(stream.input_shape),
        "online": stream.online,
        "experiences": [_experience(stream, experience) for experience in stream],
    }


def table(stream: Stream) -> list[str]:
    """A line per experience, below a headline."""
    found, what = describe(stream), "tokens" if stream.kind == "language" else "classes"
    known = "" if stream.kind == "regression" else f"{stream.num_classes} {what}, "
    shape = " x ".join(map(str, stream.input_shape))
    lines = [
        f"{stream.name}: {len(stream)} experiences, {stream.kind}, scenario {stream.scenario}, "
        f"{known}inputs {shape}"
    ]
    width = max(len(experience.name) for experience in stream)
    for number, entry in enumerate(found["experiences"], start=1):
        line = f"{number:>4}  {entry['name']:<{width}}  train {entry['train']:>7}  test {entry['test']:>6}"
        if stream.kind == "classification":
            counts = entry["train_classes"].values()
            span = " .. ".join(map(str, sorted({min(counts), max(counts)})))
            line += f"  classes {len(entry['classes']):>3}, {span} examples each"
        elif stream.kind == "language":
            line += f"  tokens {entry['train_tokens']:>9}"
        else:
            spread = entry["train_targets"]
            line += f"  targets {spread['mean']:>9.4g} ± {spread['std']:.4g}"
        lines.append(line)
    return lines


def write_overview(stream: Stream, folder: Path) -> list[Path]:
    """Write ``stream.json``, and ``samples.png`` (images) or ``samples.txt``; returns their paths.

    The first training examples of every experience are shown, evenly from all of it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(describe(stream), indent=1)
    write_atomically(folder / "stream.json", f"{text}\n".encode())
    rows = [_rows(experience) for experience in stream]
    if (images := _images(stream, rows)) is not None:
        names = [experience.name for experience in stream]
        shown = save(contact_sheet(stream.name, names, images), folder / "samples.png")
    else:
        shown = folder / "samples.txt"
        write_atomically(shown, "\n".join(_texts(stream, rows)).encode())
    return [folder / "stream.json", shown]


def _experience(stream: Stream, experience: Experience) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "name": experience.name,
        "train": len(experience.train),
        "test": len(experience.test),
        "task_label": experience.task_label,
        "classes": list(experience.classes),
    }
    for side, data in (("train", experience.train), ("test", experience.test)):
        if isinstance(data, Streamed):
            entry |= data.summary
            continue
        targets = data.tensors[1]
        if stream.kind == "language":
            entry[f"{side}_tokens"] = int(is_asked(targets).sum())
        elif stream.kind == "regression":
            std, mean = torch.std_mean(targets.double(), correction=0)
            entry[f"{side}_targets"] = {"mean": mean.item(), "std": std.item()}
        else:
            labels, counts = targets.unique(return_counts=True)
            entry[f"{side}_classes"] = dict(zip(labels.tolist(), counts.tolist(), strict=True))
    return entry


def _rows(experience: Experience) -> Tensor:
    """Rows to show: spread evenly."""
    count = len(experience.train)
    return torch.arange(min(SAMPLES, count)) * count // min(SAMPLES, count)


def _images(stream: Stream, rows: list[Tensor]) -> list[Tensor] | None:
    """(N, H, W, c) of every experience; None where inputs are no images."""
    shape = stream.input_shape
    if stream.kind != "classification" or not stream[0].test.tensors[0].is_floating_point():
        return None
    side = math.isqrt(shape[0])
    if len(shape) == 1 and (side * side != shape[0] or side < 4):
        return None
    sizes = {1: (1, side, side), 2: (1, *shape), 3: shape}.get(len(shape))
    if sizes is None or sizes[0] not in (1, 3):
        return None
    pairs = zip(stream, rows, strict=True)
    return [e.train[chosen][0].reshape(-1, *sizes).permute(0, 2, 3, 1) for e, chosen in pairs]


def _texts(stream: Stream, rows: list[Tensor]) -> Iterator[str]:
    for experience, chosen in zip(stream, rows, strict=True):
        yield f"== {experience.index + 1}: {experience.name}"
        for value, target in zip(*experience.train[chosen], strict=True):
            label = "" if stream.kind == "language" else f"[{_numbers(target)}] "
            yield f"{label}{_shown(value, stream.vocabulary)}"
        yield ""


def _shown(value: Tensor, vocabulary: tuple[bytes, ...]) -> str:
    """One input for people: a text without its padding, or numbers."""
    if value.is_floating_point():
        return _numbers(value)
    tokens = value.tolist()
    content = b"".join(vocabulary[token] for token in tokens) if vocabulary else bytes(tokens)
    return repr(content.rstrip(b"\x00").decode("utf-8", "replace")[:_LETTERS])


def _numbers(value: Tensor) -> str:
    return " ".join(f"{number:g}" for number in value.flatten().tolist())[:_LETTERS]
