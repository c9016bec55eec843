"""Ranks that hold the same tables hand each other the rows that they touched."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from cl_moe.layers.tables import ExpertTable, sparse_rows
from cl_moe.optim import exchange_rows
from tests import company

NUM, DIM = 40, 3
TOUCHED = {  # of each table, by rank: rows; None: no gradient; "all": of every row
    "some of each": [[1, 5, 39], [0, 5]],
    "one rank has none": [None, [7]],
    "one rank has no row": [[], [2, 3]],
    "nobody has one": [None, None],
    "one rank looks at all": [[4], "all"],
    "most rows": [list(range(30)), list(range(20, 39))],
}


def tables_of(rank: int) -> list[ExpertTable]:
    tables = []
    for number, touched in enumerate(TOUCHED.values()):
        rows, draw = touched[rank], torch.Generator().manual_seed(10 * number + rank)
        table = ExpertTable(torch.zeros(NUM, DIM))
        if rows == "all":
            table.grad = torch.randn(NUM, DIM, generator=draw)
        elif rows is not None:
            table.grad = sparse_rows(
                torch.tensor(rows).long(), torch.randn(len(rows), DIM, generator=draw), NUM
            )
        tables.append(table)
    return tables


def exchange(folder: Path) -> None:
    tables = tables_of(dist.get_rank())
    sent = exchange_rows(tables)
    left = {str(i): torch.empty(0) if t.grad is None else t.grad for i, t in enumerate(tables)}
    torch.save(left | {"sent": torch.tensor(sent)}, folder / f"left_{dist.get_rank()}.pt")


def test_every_rank_gets_the_average_of_all_and_sends_what_it_touched(tmp_path):
    company.among(2, exchange, tmp_path, folder=tmp_path)
    first, second = company.results(tmp_path, 2)
    assert first["sent"] == second["sent"]
    # counts; the most rows of any rank, ids and values; in a ring one table, and one with who was touched
    by_hand = (3 + 1 + 2) * (8 + 4 * DIM)
    assert first["sent"] == 8 * len(TOUCHED) + by_hand + 4 * DIM * NUM + (4 * DIM + 1) * NUM
    for number, (name, pair) in enumerate(
        zip(TOUCHED, zip(tables_of(0), tables_of(1), strict=True), strict=True)
    ):
        got = first[str(number)]
        assert got.is_sparse == (name not in ("nobody has one", "one rank looks at all")), name
        assert torch.equal(got.to_dense(), second[str(number)].to_dense()), name
        if name != "nobody has one":
            expected = sum(torch.zeros(NUM, DIM) if t.grad is None else t.grad.to_dense() for t in pair) / 2
            torch.testing.assert_close(got.to_dense(), expected, msg=name)


def test_alone_nothing_is_sent():
    (table, *_) = tables_of(0)
    before = table.grad
    assert exchange_rows([table]) == 0
    assert table.grad is before
