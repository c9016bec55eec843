"""The files that a run leaves behind, and their readers. Each is written whole or not at all.

Legend: T experiences, row i: after i experiences (row 0: before any training), N experts of a layer.
"""

from __future__ import annotations

import csv
import json
import platform
from importlib import metadata
from io import BytesIO, StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from cl_moe import files
from cl_moe.errors import InputError
from cl_moe.layers.routing import ExpertLoad
from cl_moe.tracking.record import Record

if TYPE_CHECKING:
    import pyarrow as pa

MATRIX = "accuracy_matrix.csv"
LEDGER = "ledger.json"
LOADS = "expert_load.parquet"
ENVIRONMENT = "environment.txt"

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
    """Write matrix, ledger, loads (no lines without experts), environment into ``folder``, made if missing.

    Returns:
        The paths written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return [
        write_matrix(record, folder / MATRIX),
        write_ledger(record.ledger, folder / LEDGER),
        write_loads(record, folder / LOADS),
        write_environment(folder / ENVIRONMENT),
    ]


def write_matrix(record: Record, path: Path) -> Path:
    """The accuracy matrix: a row per point i, first the one before training, a column per experience.

    Numbers stand in their shortest form that reads back as the same float64; minus the loss for language.
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


def write_loads(record: Record, path: Path) -> Path:
    """Expert loads in long form: a line per point, layer, experience and expert that was chosen at all.

    Columns: ``experiences_trained`` int32, ``layer`` int32 (block index), ``experience`` int32, ``expert``
    int64 (its id for life), ``cohort`` int32, ``birth`` int32 (experiences trained before it was born),
    ``frozen`` bool (by then), ``score`` float64 (gating weight accumulated), ``count`` int64 (slots,
    dropped ones included). Lines with count 0 are left out; how many experts there are stands in the file's
    metadata, ``num_experts``: JSON, for each point ``{layer: N}``. Slots kept stand there too, ``kept``:
    JSON, for each point ``{layer: [per experience]}``.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    pieces = [
        _load_lines(load, cohorts.get(layer, []), i, layer, experience)
        for i, (per_layer, cohorts) in enumerate(zip(record.loads, record.cohorts, strict=True))
        for layer, loads in per_layer.items()
        for experience, load in enumerate(loads)
    ]
    schema = _load_schema().with_metadata(
        {
            "num_experts": json.dumps([_sizes(per_layer) for per_layer in record.loads]),
            "kept": json.dumps([_kept(per_layer) for per_layer in record.loads]),
        }
    )
    empty = {name: torch.empty(0, dtype=torch.int64) for name in schema.names}
    columns = {name: torch.cat([piece[name] for piece in pieces or [empty]]).numpy() for name in schema.names}
    arrays = [pa.array(columns[field.name]).cast(field.type) for field in schema]
    table = pa.Table.from_arrays(arrays, schema=schema)
    content = BytesIO()
    pq.write_table(table, content)
    files.write_atomically(path, content.getbuffer())
    return path


def read_loads(path: Path) -> list[dict[int, list[ExpertLoad]]]:
    """What ``write_loads`` wrote, as ``Record.loads``: ``{block index: [load per experience]}`` per point."""
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    about = table.schema.metadata
    sizes, kept = json.loads(about[b"num_experts"]), json.loads(about[b"kept"])
    points: list[dict[int, list[ExpertLoad]]] = [
        {int(layer): [_no_load(size, slots) for slots in kept[i][layer]] for layer, size in row.items()}
        for i, row in enumerate(sizes)
    ]
    for place, lines in table.to_pandas().groupby([_INDEX, "layer", "experience"]):
        i, layer, experience = place
        load, expert = points[i][layer][experience], torch.tensor(lines["expert"].to_numpy())
        load.score[expert] = torch.tensor(lines["score"].to_numpy())
        load.count[expert] = torch.tensor(lines["count"].to_numpy())
    return points


def write_environment(path: Path) -> Path:
    """Python, platform and the versions of everything installed; neither the user's name nor a path."""
    packages = {
        distribution.metadata["Name"]: distribution.version
        for distribution in metadata.distributions()
        if distribution.metadata["Name"]
    }
    lines = [
        f"python {platform.python_version()} ({platform.python_implementation()})",
        f"platform {platform.system()} {platform.release()} {platform.machine()}",
        *(f"{name}=={packages[name]}" for name in sorted(packages, key=str.lower)),
    ]
    return write_text("\n".join(lines) + "\n", path)


def write_text(text: str, path: Path) -> Path:
    """Write a UTF-8 file whole or not at all."""
    files.write_atomically(path, text.encode())
    return path


def _load_schema() -> pa.Schema:
    """Columns of the long form and their types."""
    import pyarrow as pa

    int32, int64 = pa.int32(), pa.int64()
    return pa.schema(
        [
            (_INDEX, int32),
            ("layer", int32),
            ("experience", int32),
            ("expert", int64),
            ("cohort", int32),
            ("birth", int32),
            ("frozen", pa.bool_()),
            ("score", pa.float64()),
            ("count", int64),
        ]
    )


def _load_lines(
    load: ExpertLoad, cohorts: list[tuple[int, int, bool]], i: int, layer: int, experience: int
) -> dict[str, Tensor]:
    """The columns of one load, for experts with a count; a layer without cohorts counts as one of them."""
    cohorts = cohorts or [(load.count.numel(), 0, False)]
    expert = load.count.nonzero().squeeze(1).cpu()
    ends = torch.tensor([size for size, _, _ in cohorts], dtype=torch.int64).cumsum(0)
    cohort = torch.bucketize(expert, ends, right=True)
    births = torch.tensor([birth for _, birth, _ in cohorts], dtype=torch.int64)
    frozen = torch.tensor([stopped for _, _, stopped in cohorts], dtype=torch.bool)
    return {
        _INDEX: torch.full_like(expert, i),
        "layer": torch.full_like(expert, layer),
        "experience": torch.full_like(expert, experience),
        "expert": expert,
        "cohort": cohort,
        "birth": births[cohort],
        "frozen": frozen[cohort],
        "score": load.score.cpu().double()[expert],
        "count": load.count.cpu()[expert],
    }


def _sizes(per_layer: dict[int, list[ExpertLoad]]) -> dict[int, int]:
    return {layer: max(load.count.numel() for load in loads) for layer, loads in per_layer.items() if loads}


def _kept(per_layer: dict[int, list[ExpertLoad]]) -> dict[int, list[int]]:
    return {layer: [int(load.kept) for load in loads] for layer, loads in per_layer.items() if loads}


def _no_load(size: int, kept: int) -> ExpertLoad:
    """A load with no slots; ``kept`` as it was."""
    return ExpertLoad(
        torch.zeros(size, dtype=torch.float64), torch.zeros(size, dtype=torch.int64), torch.tensor(kept)
    )
