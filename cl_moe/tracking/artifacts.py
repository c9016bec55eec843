"""The files that a run leaves behind, and their readers. Each is written whole or not at all.

Legend: T experiences, row i: after i experiences (row 0: before any training), N experts of a layer.
"""

from __future__ import annotations

import csv
import json
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cl_moe import files
from cl_moe.errors import InputError
from cl_moe.tracking.inside import ANYTIME, write_anytime
from cl_moe.tracking.loads import LOADS, write_loads
from cl_moe.tracking.loads import read_loads as read_loads
from cl_moe.tracking.record import Record

MATRIX = "accuracy_matrix.csv"
LEDGER = "ledger.json"
LEAK = "leak.csv"

_INDEX = "experiences_trained"


class Matrix(NamedTuple):
    """An accuracy matrix read back.

    Args:
        scores: (rows, T) float64, R[i, j]; row 0 before any training.
        names: of the T experiences.
    """

    scores: Tensor
    names: list[str]


def write_artifacts(record: Record, folder: Path) -> list[Path]:
    """Write matrix, ledger, loads and leak (no lines without experts) into ``folder``.

    Evaluations inside experiences too, where there were any.

    It is made if it is missing; what lies there of earlier rows' loads (``tracking.loads``) is put together.

    Returns:
        The paths written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    inside = [write_anytime(record, folder / ANYTIME)] if record.anytime else []
    return [
        *inside,
        write_matrix(record, folder / MATRIX),
        write_ledger(record.ledger, folder / LEDGER),
        write_loads(record, folder / LOADS),
        write_leak(record, folder / LEAK),
    ]


def write_matrix(record: Record, path: Path) -> Path:
    """The accuracy matrix: a row per point i, first the one before training, a column per experience.

    Numbers stand in their shortest form that reads back as the same float64; minus the loss where it is one.
    """
    text = StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow([_INDEX, *record.names])
    for i, row in enumerate(record.rows):
        table.writerow([i, *(repr(score) for score in row.double().tolist())])
    return write_text(text.getvalue(), path)


def read_matrix(path: Path) -> Matrix:
    """What ``write_matrix`` wrote, exactly.

    Raises:
        InputError: the file is no accuracy matrix.
    """
    with path.open(newline="", encoding="utf-8") as file:
        header, *rows = list(csv.reader(file)) or [[]]
    numbered = [row[:1] for row in rows] == [[str(i)] for i in range(len(rows))]
    if header[:1] != [_INDEX] or not numbered or any(len(row) != len(header) for row in rows):
        raise InputError(
            got=f"{path.name} with header {header[:3]} and {len(rows)} rows",
            allowed=f"a header {_INDEX!r} and experience names, then rows numbered 0, 1, ...",
            key=path.name,
        )
    scores = torch.tensor([[float(cell) for cell in row[1:]] for row in rows], dtype=torch.float64)
    return Matrix(scores.reshape(len(rows), len(header) - 1), header[1:])


def write_ledger(ledger: list[dict[str, Any]], path: Path) -> Path:
    """Growth and freeze events, oldest first, as a JSON list."""
    return write_text(json.dumps(ledger, indent=2, allow_nan=False) + "\n", path)


def read_ledger(path: Path) -> list[dict[str, Any]]:
    """What ``write_ledger`` wrote."""
    ledger: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return ledger


def write_leak(record: Record, path: Path) -> Path:
    """The leak as a matrix: which share of an experience's routed weight goes to which cohort, at each point.

    A line per point, layer, cohort and experience: ``experiences_trained``, ``layer`` (block index),
    ``cohort``, ``birth`` (experiences trained before it was born; more than ``experience``: born after it was
    learnt), ``experience``, ``share`` in [0, 1], which adds up to 1 over the cohorts; ``nan`` where nothing
    was routed.
    """
    text = StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow([_INDEX, "layer", "cohort", "birth", "experience", "share"])
    for i, per_layer in enumerate(record.shares):
        for layer, share_CT in per_layer.items():
            births = [birth for _, birth, _ in record.cohorts[i].get(layer, [(0, 0, False)])]
            for cohort, (birth, row) in enumerate(zip(births, share_CT.tolist(), strict=True)):
                for experience, share in enumerate(row):
                    table.writerow([i, layer, cohort, birth, experience, repr(share)])
    return write_text(text.getvalue(), path)


def write_text(text: str, path: Path) -> Path:
    """Write a UTF-8 file whole or not at all."""
    files.write_atomically(path, text.encode())
    return path
