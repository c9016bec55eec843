"""A stream that arrives file by file: going on equals having had all of it; what was learnt stays."""

from __future__ import annotations

import random
import runpy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlflow
import pytest

from cl_moe import checkpoint
from cl_moe.tracking import artifacts

differences = runpy.run_path(str(Path(__file__).with_name("chaos.py")))["differences"]
Command = Callable[..., Any]

pytestmark = pytest.mark.usefixtures("no_drawing")
NUMBERS = (
    *("stream=arriving", "model=mlp", "optimizer=sgd", "model.width=8", "trainer.epochs=2"),
    *("stream.columns.input=[x,y]", "stream.columns.label=kind", "stream.test_share=.25"),
    *("layer=moe", "layer.num_experts=2", "layer.hidden=4", "strategy=[replay,lwf]", "hydra.run.dir=run"),
)
GROW = ("growth=every_experience", "growth.num_experts=2", "freeze=past_experts")
TEXT = (
    *("stream=arriving", "stream.test_share=.25", "stream.context=16", "model.width=8", "model.num_blocks=1"),
    *(
        "stream.tokenizer={kind:bpe,vocab_size:265}",
        "stream.held_out={press:{path:brown_press.parquet,bytes:500}}",
    ),
    *("hydra.run.dir=run", "eval.every=3", "trainer.batch_size=4"),
)


def table(folder: Path, name: str, kinds: Sequence[str], seed: int) -> None:
    """A file of rows of two numbers and a class."""
    draw = random.Random(seed)
    lines = [
        f"{draw.random()},{draw.random() + index % len(kinds)},{kinds[index % len(kinds)]}"
        for index in range(24)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("\n".join(["x,y,kind", *lines]) + "\n")


def text(folder: Path, name: str, seed: int) -> None:
    draw = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    lines = [" ".join(draw.choices(["ant", "bee", "cow", "dog"], k=12)) + ".\n" for _ in range(20)]
    (folder / name).write_text("".join(lines))


def arrive(folder: Path, kind: str, index: int, scenario: str) -> None:
    """The next file."""
    if kind == "text":
        text(folder / "arriving", f"{index}.txt", index)
    else:
        kinds = ["a", "b"] if scenario == "domain" else ["zy", "xw", "vu"][index]
        table(folder / "arriving", f"{index}.csv", kinds, index)


@pytest.mark.parametrize(
    ("kind", "scenario"),
    [
        ("numbers", "class"),
        pytest.param("numbers", "task", marks=pytest.mark.slow),
        pytest.param("numbers", "domain", marks=pytest.mark.slow),
        pytest.param("text", "domain", marks=pytest.mark.slow),
    ],
)
def test_going_on_equals_having_had_everything(
    kind: str, scenario: str, command_in: Command, tmp_path: Path
) -> None:
    words = (*((*NUMBERS, *GROW) if kind == "numbers" else TEXT), f"stream.scenario={scenario}")
    later, atonce = tmp_path / "later", tmp_path / "atonce"
    for index in range(2):
        arrive(later, kind, index, scenario)
    first = command_in(later, *words)
    assert first.status == 0, first.text
    assert "2 of 2 experiences" in first.text
    for index in range(3):
        arrive(atonce, kind, index, scenario)
    arrive(later, kind, 2, scenario)
    on = command_in(later, "resume=run")
    whole = command_in(atonce, *words)
    assert (on.status, whole.status) == (0, 0), on.text + whole.text
    assert "resumed after experience 2 of 3" in on.text, on.text
    assert on.objectives == whole.objectives
    states = [checkpoint.newest(folder / "run/checkpoints") for folder in (later, atonce)]
    for state in states:  # what was not measured is NaN, which nothing is equal to
        state["record"]["rows"] = [row.nan_to_num(7) for row in state["record"]["rows"]]
    kept = [{part: state[part] for part in ("learner", "record", "past")} for state in states]
    assert list(differences(*kept)) == []
    matrices = [(folder / "run" / artifacts.MATRIX).read_bytes() for folder in (later, atonce)]
    assert matrices[0] == matrices[1]
    assert matrices[0].count(b"nan") == 6, "what comes is not measured before it is learnt"
    points = [_points(folder) for folder in (later, atonce)]
    assert points[0] == points[1]
    assert (later / "run/data.json").read_bytes() == (atonce / "run/data.json").read_bytes()


def _points(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """All that MLflow has of the only run, but what it cost; and the tag of its data."""
    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
    (run,) = client.search_runs(["1"])
    keys = [key for key in run.data.metrics if not key.startswith(("cost/", "system/"))]
    found = {
        key: sorted((m.step, m.value) for m in client.get_metric_history(run.info.run_id, key))
        for key in keys
    }
    assert run.info.status == "FINISHED"
    return found | {run.data.tags["data_checksum"]: []}


@pytest.mark.slow
def test_auto_resume_looks_for_more(command: Command, tmp_path: Path) -> None:
    arrive(tmp_path, "numbers", 0, "class")
    words = (*NUMBERS, "stream.scenario=class", "auto_resume=true", "tracking=none")
    assert command(*words).status == 0
    assert "resumed after experience 1 of 1" in command(*words).text
    arrive(tmp_path, "numbers", 1, "class")
    assert "resumed after experience 1 of 2" in command(*words).text
    arrive(tmp_path, "numbers", 2, "class")
    assert "resumed after experience 2 of 3" in command(*words).text


def test_what_was_learnt_may_not_change(command: Command, tmp_path: Path) -> None:
    folder = tmp_path / "arriving"
    for index in range(2):
        arrive(tmp_path, "numbers", index, "class")
    assert command(*NUMBERS, "stream.scenario=class", "tracking=none").status == 0
    first, second = ((folder / name).read_text() for name in ("0.csv", "1.csv"))
    arrive(tmp_path, "numbers", 2, "class")
    for name, content, words in (
        (
            "1.csv",
            second.replace("0.1", "0.2"),
            "experience 1, which was '1' when it was learnt, and is changed",
        ),
        (
            "0.csv",
            first + "0.5,0.5,zy\n".replace("zy", "z"),
            "experience 0, which was '0' when it was learnt, and is changed",
        ),
        ("1.csv", None, "experience 1, which was '1' when it was learnt, and is '2' now"),
        ("05.csv", second, "experience 1, which was '1' when it was learnt, and is '05' now"),
    ):
        before = (folder / name).read_text() if (folder / name).exists() else None
        (folder / name).unlink(missing_ok=True)
        if content is not None:
            (folder / name).write_text(content)
        done = command("resume=run")
        assert (done.status, words in done.text) == (2, True), done.text
        (folder / name).unlink(missing_ok=True)
        if before is not None:
            (folder / name).write_text(before)
    assert "resumed after experience 2 of 3" in command("resume=run").text


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (("stream.files=nothing/*",), "stream.files"),
        (("stream.shape={blurry:.1}",), "stream.shape.blurry"),
        (("+stream.columns.domain=x",), "stream.columns.domain"),
        (("stream.scenario=domain",), "stream.scenario"),
        (("strategy=joint",), "strategy"),
        (("stream.columns.label=null",), "stream.columns.label"),
        (("stream.columns.input=[x,z]",), "stream.columns.input"),
        (("stream.test_share=null",), "stream.test_share"),
    ],
)
def test_what_is_refused(command: Command, tmp_path: Path, words: tuple[str, ...], key: str) -> None:
    for index in range(2):
        arrive(tmp_path, "numbers", index, "class")
    scenario = () if "stream.scenario=domain" in words else ("stream.scenario=class",)
    done = command(*NUMBERS, *scenario, "tracking=none", *words)
    assert (done.status, f"change: {key}" in done.text) == (2, True), done.text


@pytest.mark.slow
def test_a_plan_may_look_ahead(command: Command, tmp_path: Path) -> None:
    arrive(tmp_path, "numbers", 0, "class")
    plan = ("growth=at", "growth.events={1:2,7:2}", "stream.scenario=class", "tracking=none")
    assert command(*NUMBERS, *plan).status == 0
    arrive(tmp_path, "numbers", 1, "class")
    assert "4 experts" in command("resume=run").text
