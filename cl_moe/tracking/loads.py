"""Expert loads on the disk: a file for every row while a run goes on, one table of all rows at its end.

Loads of a million experts on every experience would fill every checkpoint, row upon row; so a record holds
those of its newest row, and ``loads/003.parquet`` in the run's folder those of row 3.

Legend: N experts of a layer.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cl_moe import files
from cl_moe.errors import InputError
from cl_moe.layers.routing import ExpertLoad
from cl_moe.tracking.diagnostics import cohorts_of
from cl_moe.tracking.record import Loads, Record

if TYPE_CHECKING:
    import pyarrow as pa

LOADS = "expert_load.parquet"
ROWS = "loads"
_INDEX = "experiences_trained"
_ABOUT = ("num_experts", "kept")
log = logging.getLogger(__name__)


def keep_row(record: Record, folder: Path) -> None:
    """Write the loads of the newest row into a file of their own; older rows' leave the record.

    Before the checkpoint that holds the row: a run killed in between measures and writes the same once more.
    """
    newest = len(record.loads) - 1
    if record.loads[newest]:
        (folder / ROWS).mkdir(parents=True, exist_ok=True)
        content = BytesIO()
        _write([_in_memory(record, newest)], content)
        files.write_atomically(_file(folder, newest), content.getbuffer())
    record.loads[:newest] = [{} for _ in range(newest)]


def copy_rows(source: Path, target: Path, last: int) -> None:
    """Give a branch the rows up to ``last`` of its parent's folder, as far as they are there."""
    for i in range(last + 1):
        if (content := _content(_file(source, i))) is not None:
            (target / ROWS).mkdir(parents=True, exist_ok=True)
            files.write_atomically(_file(target, i), content)


def write_loads(record: Record, path: Path) -> Path:
    """Expert loads in long form: a line per point, layer, experience and expert that was chosen at all.

    Columns: ``experiences_trained`` int32, ``layer`` int32 (block index), ``experience`` int32, ``expert``
    int64 (its id for life), ``cohort`` int32, ``birth`` int32 (experiences trained before it was born),
    ``frozen`` bool (by then), ``score`` float64 (gating weight accumulated), ``count`` int64 (slots,
    dropped ones included). Lines with count 0 are left out; how many experts there are stands in the file's
    metadata, ``num_experts``: JSON, for each point ``{layer: N}``. Slots kept stand there too, ``kept``:
    JSON, for each point ``{layer: [per experience]}``.

    Rows that the record does not hold are read from the files beside ``path``; one that is missing or damaged
    is left out, with a warning.
    """
    with files.whole_or_not(path.with_name(f".{path.name}.{os.getpid()}")) as (file, rename):
        tables = [_row(record, i, path.parent) for i in range(len(record.loads))]
        _write(tables, file)
        rename(path)
    return path


def read_loads(path: Path) -> list[Loads]:
    """What ``write_loads`` wrote, as ``Record.loads``: ``{block index: [load per experience]}`` per point."""
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    sizes, kept = (json.loads(table.schema.metadata[name.encode()]) for name in _ABOUT)
    points: list[Loads] = [
        {int(layer): [_no_load(size, slots) for slots in kept[i][layer]] for layer, size in row.items()}
        for i, row in enumerate(sizes)
    ]
    for place, lines in table.to_pandas().groupby([_INDEX, "layer", "experience"]):
        i, layer, experience = place
        load, expert = points[i][layer][experience], torch.tensor(lines["expert"].to_numpy())
        load.score[expert] = torch.tensor(lines["score"].to_numpy())
        load.count[expert] = torch.tensor(lines["count"].to_numpy())
    return points


def _file(folder: Path, row: int) -> Path:
    return folder / ROWS / f"{row:03d}.parquet"


def _content(path: Path) -> bytes | None:
    """Bytes of a regular file; None where there is none."""
    try:
        with open(path, "rb", opener=files.regular) as file:
            return file.read()
    except (FileNotFoundError, NotADirectoryError, InputError):
        return None


def _row(record: Record, i: int, folder: Path) -> pa.Table:
    """The table of one row, from the record or from its file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if record.loads[i] or not record.cohorts[i]:
        return _in_memory(record, i)
    content = _content(_file(folder, i))
    try:
        if content is not None:
            table = pq.read_table(BytesIO(content))
            if table.schema.equals(_schema()) and all(len(part) == 1 for part in _about(table)):
                return table
    except (pa.ArrowException, KeyError, TypeError, ValueError):
        pass
    log.warning("%s is missing or damaged: %s lacks that row", _file(folder, i), LOADS)
    return _in_memory(record, i)


def _about(table: pa.Table) -> Iterator[list[object]]:
    return (json.loads(table.schema.metadata[name.encode()]) for name in _ABOUT)


def _write(tables: list[pa.Table], file: object) -> None:
    """Tables one below the other, each row's in a group of its own; what is said about them, likewise."""
    import pyarrow.parquet as pq

    said = [list(_about(table)) for table in tables]
    about = {name: json.dumps([one for row in said for one in row[k]]) for k, name in enumerate(_ABOUT)}
    schema = _schema().with_metadata(about)
    with pq.ParquetWriter(file, schema) as writer:
        for table in tables:
            writer.write_table(table.replace_schema_metadata(about))


def _in_memory(record: Record, i: int) -> pa.Table:
    """The loads of row i that the record holds."""
    import pyarrow as pa

    per_layer = record.loads[i]
    pieces = [
        _lines(load, record, i, layer, experience)
        for layer, loads in per_layer.items()
        for experience, load in enumerate(loads)
    ]
    schema = _schema()
    empty = {name: torch.empty(0, dtype=torch.int64) for name in schema.names}
    columns = {name: torch.cat([piece[name] for piece in pieces or [empty]]).numpy() for name in schema.names}
    arrays = [pa.array(columns[field.name]).cast(field.type) for field in schema]
    sizes = {layer: max(load.count.numel() for load in loads) for layer, loads in per_layer.items() if loads}
    kept = {layer: [int(load.kept) for load in loads] for layer, loads in per_layer.items() if loads}
    about = {"num_experts": json.dumps([sizes]), "kept": json.dumps([kept])}
    return pa.Table.from_arrays(arrays, schema=schema.with_metadata(about))


def _schema() -> pa.Schema:
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


def _lines(load: ExpertLoad, record: Record, i: int, layer: int, experience: int) -> dict[str, Tensor]:
    """The columns of one load, for experts with a count."""
    cohorts = cohorts_of(record, i, layer, load.count.numel())
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


def _no_load(size: int, kept: int) -> ExpertLoad:
    """A load with no slots; ``kept`` as it was."""
    return ExpertLoad(
        torch.zeros(size, dtype=torch.float64), torch.zeros(size, dtype=torch.int64), torch.tensor(kept)
    )
