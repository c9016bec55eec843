"""What the comparison leaves out, marks, or refuses: reproductions, formulas, empty names, many arms."""

from __future__ import annotations

import csv
import io
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from rich.console import Console

from cl_moe.tracking import figures
from cl_moe.tracking.artifacts import MATRIX, write_matrix
from cl_moe.tracking.compare import compare, main
from cl_moe.tracking.compare.arms import notes_on
from cl_moe.tracking.compare.export import write_csv, write_latex
from cl_moe.tracking.compare.match import Match, aligned
from cl_moe.tracking.compare.report import write_report
from cl_moe.tracking.compare.runs import lower_is_better
from cl_moe.tracking.compare.statistics import Inference
from cl_moe.tracking.compare.table import compare_arms, difference_table, score_table
from cl_moe.tracking.figures.arms import MOST_PANELS
from cl_moe.tracking.figures.tradeoff import pareto
from cl_moe.tracking.record import Record
from cl_moe.tracking.store import open_store
from tests.tracking.comparisons import ACCURACY, FEW, arms_of, run_of, store_run, view_of


def printed(table: object) -> str:
    console = Console(file=io.StringIO(), width=100)
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> tuple[MlflowClient, str]:
    """A store of runs that reproduce others, of two sweeps, and of costs without a first point."""
    folder = tmp_path_factory.mktemp("edges")
    uri = f"sqlite:///{folder}/mlflow.db"
    client = open_store(uri)
    add = partial(store_run, client, artifacts=folder / "artifacts")
    for init in range(2):
        add("again", "naive", init, metrics={ACCURACY: 0.5}, sweep="morning")
        add("again", "lwf", init, metrics={ACCURACY: 0.75}, sweep="evening")
    add("again", "naive", 1, metrics={ACCURACY: 0.0}, reproduces="another")
    add("again", "lwf", 1, metrics={ACCURACY: 0.0}, reproduces="another", status="FAILED")
    rows = [[0.0, 0.0], [0.8, 0.0], [0.2, 0.8]]
    for arm, spent in (("naive", [0.0, 8.0, 16.0]), ("costly", [0.0, 8.0, 40.0]), ("bare", [0.0, 1.0, 2.0])):
        metrics = {ACCURACY: 0.5}
        run_id = add("costs", arm, 0, metrics=metrics, curves={"cost/seconds": spent})
        late = dict(zip((10, 20), spent[1:], strict=True))
        for step, value in late.items():  # nothing was spent at first, so nothing was written
            client.log_metric(run_id, "cost/diagnostics_flops", value, step=step)
        if arm != "bare":
            record = Record("classification", ["a", "b"])
            record.rows += [torch.tensor(row, dtype=torch.float64) for row in rows]
            client.log_artifact(run_id, str(write_matrix(record, folder / MATRIX)))
    return client, uri


def test_a_reproduction_does_not_take_its_originals_place(
    store: tuple[MlflowClient, str], tmp_path: Path
) -> None:
    result = compare(store[1], "again", out=tmp_path, how=FEW)
    assert [(row.arm, row.runs, row.metrics[ACCURACY].mean) for row in result.comparisons[0].rows] == [
        ("naive", 2, 0.5),
        ("lwf", 2, 0.75),
    ]
    assert "Left out, since they reproduce another run: naive (1), lwf (1)." in result.notes
    assert not [note for note in result.notes if "newest" in note or "not finished" in note]


def test_what_was_reproduced_is_no_configuration() -> None:
    arms = arms_of([run_of(init=0, reproduce="None"), run_of(init=1, reproduce="abc")])
    params = [frozenset({*run.params, "reproduce"}) for run in arms[0].runs]
    for run, names in zip(arms[0].runs, params, strict=True):
        object.__setattr__(run, "params", names)
    assert notes_on(arms, None, ACCURACY) == []


@pytest.mark.parametrize("key", ["cost/diagnostics_flops", "cost/seconds"])
def test_costs_without_a_first_point_are_aligned(
    key: str, store: tuple[MlflowClient, str], tmp_path: Path
) -> None:
    """At 16 of its 40 the arm stands a quarter of the way from its row 1 to its row 2."""
    result = compare(store[1], "costs", out=tmp_path, how=FEW, match=Match(key, 0.5), baseline="naive")
    found = {row.arm: row.matched for row in result.comparisons[0].rows}
    assert found["costly"] is not None
    assert found["costly"].score == pytest.approx(0.4 + 0.25 * (0.5 - 0.4))
    assert found["bare"] is not None
    assert found["bare"].pairs == 0
    (named,) = (note for note in result.notes if "at equal cost" in note)
    assert named.endswith(": bare 0.natural.0.")


@pytest.mark.parametrize(
    ("costs", "steps", "rows", "expected"),
    [
        ({0: 1.0, 5: 2.0}, [], 2, [1, 2]),
        ({5: 2.0, 9: 3.0}, [], 3, [0, 2, 3]),
        ({9: 3.0}, [0, 5, 9], 3, [0, 0, 3]),
        ({0: 0.0, 9: 3.0}, [0, 9], 4, [0, 3, 3, 3]),  # joint training
        ({0: 0.0, 9: 3.0}, [0, 5, 9], 3, [0, 0, 3]),
        ({0: 0.0, 5: 1.0, 9: 3.0}, [], 2, None),
        ({}, [0, 5], 3, None),
    ],
)
def test_aligned(costs: dict[int, float], steps: list[int], rows: int, expected: list[float] | None) -> None:
    got = aligned(costs, steps, rows)
    assert (None if got is None else got.tolist()) == expected


@pytest.mark.parametrize(
    ("options", "key"),
    [
        (["--uri", ""], "--uri"),
        (["--group-by", ","], "--group-by"),
        (["--tolerance", "nan"], "--tolerance"),
        (["--tolerance", "-1"], "--tolerance"),
        (["--tolerance", "-1", "--match", "cost/seconds"], "--tolerance"),
        (["--sweep", "zz"], "allowed: evening, morning"),
    ],
)
def test_options_that_say_nothing(
    options: list[str], key: str, store: tuple[MlflowClient, str], tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        main(["--uri", store[1], "--experiment", "again", *options])
    assert exit_.value.code == 2
    assert key in capsys.readouterr().err
    assert not (tmp_path / "comparison").exists()


@pytest.mark.parametrize("key", ["experts/layer_00/latency", "experts/squared_cv", "stream/forgetting"])
def test_lower_is_better(key: str) -> None:
    assert lower_is_better(key)
    assert not lower_is_better("cost/compression")


def test_tables_say_what_they_show() -> None:
    metrics = {"stream/forgetting_routing": 0.1}
    other, lacking = run_of("lwf", order="other", metrics=metrics), run_of("replay", value=None)
    arms = arms_of([run_of(metrics=metrics), other, lacking])
    one = compare_arms("digits", arms, arms[0], None, FEW)
    assert printed(difference_table(one)).count("no pairs") == 2
    assert "classes" in printed(score_table(one))


def intervals(num: int, how: Inference, tmp_path: Path) -> tuple[str, str]:
    """What LaTeX's comment and the report say of so many pairs."""
    view = view_of(arms_of([run_of(arm, k, value=k**0.5) for arm in ("naive", "lwf") for k in range(num)]))
    tex = write_latex([view.comparison], how, tmp_path / "a.tex").read_text()
    page = write_report([view], [], "x", how, None, tmp_path / "a.html").read_text()
    return next(line for line in tex.splitlines() if line.startswith("%")), page[: page.index("</p>")]


def test_which_interval_at_which_level(tmp_path: Path) -> None:
    for said in intervals(3, FEW, tmp_path):
        assert "95% interval (Student" in said.replace("&#x27;", "'")
        assert "resamples" not in said
    for said in intervals(8, FEW._replace(confidence=0.9), tmp_path):
        assert "90% interval (bootstrap over orders and seeds, 500 resamples)" in said


def test_latex_has_its_best_numbers_bold_in_math(tmp_path: Path) -> None:
    arms = arms_of([run_of("a", k, value=0.2) for k in (0, 1)] + [run_of("b", k, value=0.7) for k in (0, 1)])
    text = write_latex([compare_arms("x", arms, arms[0], None, FEW)], FEW, tmp_path / "a.tex").read_text()
    assert r"$\mathbf{0.700}$ $\pm$" in text
    assert r"\textbf" not in text
    assert text.count("mathbf") == 1


@pytest.mark.parametrize("name", ["=1+1", "+a", "-a", "@a", "a=1"])
def test_a_spreadsheet_runs_no_name(name: str, tmp_path: Path) -> None:
    arms = arms_of([run_of(name, value=-0.5), run_of("lwf")])
    one = compare_arms("digits", arms, arms[0], None, FEW)
    with write_csv([one], tmp_path / "a.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    shown = name if name == "a=1" else f"'{name}"
    assert (first["arm"], first["baseline"], second["baseline"]) == (shown, shown, shown)
    assert float(first[f"{ACCURACY}/mean"]) == -0.5


@pytest.mark.parametrize("name", ["", "  "])
def test_an_empty_name_is_said(name: str) -> None:
    assert [arm.name for arm in arms_of([run_of(name), run_of("lwf")])] == ["(no name)", "lwf"]


def test_many_matrices_do_not_make_a_tower() -> None:
    def inches(num: int) -> float:
        arms = {f"arm {k}": [np.full((3, 2), k / num)] for k in range(num)}
        figure = figures.compare_matrices(arms)
        title = figure.get_suptitle()
        assert title == (f"The first {MOST_PANELS} of {num} arms" if num > MOST_PANELS else "")
        return float(figure.get_size_inches()[1])

    assert inches(40) == inches(MOST_PANELS) > inches(3)


def test_both_axes_of_the_tradeoff_are_labelled_alike() -> None:
    axes = pareto({"a": [(0.5, 0.1)], "b": [(0.7, 0.2)]}).axes[0]
    assert axes.xaxis.label.get_fontsize() == axes.yaxis.label.get_fontsize()


@pytest.mark.parametrize(("metric", "way"), [(ACCURACY, "higher"), ("stream/average_loss", "lower")])
def test_the_page_says_which_way_learning_counts(metric: str, way: str, tmp_path: Path) -> None:
    view = view_of(arms_of([run_of(value=None, metrics={metric: 0.5})]))
    page = write_report([view], [], "x", FEW, None, tmp_path / "a.html").read_text()
    (label,) = re.findall(r'"label": "([^"]*just after learning[^"]*)"', page)
    assert f"({way} is better)" in label
