"""What CONTRIBUTING says of streams and strategies of one's own, done as it says, in an empty folder."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text("utf-8")
SECTION = TEXT[TEXT.index("## Outside the checkout") : TEXT.index("## Log a finding")]
Command = Callable[..., Any]

pytestmark = pytest.mark.usefixtures("no_drawing")


@pytest.fixture
def outside(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with all files of the section, each under the name in its comment, and the data."""
    for kind, block in re.findall(r"```(\w+)\n(.*?)```", SECTION, re.DOTALL):
        if kind != "sh":
            path = tmp_path / re.findall(r"^# (\S+\.(?:py|yaml))$", block, re.MULTILINE)[0]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block)
    rows = [f"a {name} it is {number},{name}" for number in range(8) for name in ("ant", "bee", "cow", "dog")]
    (tmp_path / "animals.csv").write_text("\n".join(["text,animal", *rows]) + "\n")
    for module in ("my_blobs", "calm"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def test_its_commands_run(outside: Path, command: Command) -> None:
    (block,) = re.findall(r"```sh\n(.*?)```", SECTION, re.DOTALL)
    lines = [line.removeprefix("PYTHONPATH=. ") for line in block.splitlines()]
    assert len(lines) == 3
    for line in lines:
        done = command(*shlex.split(line)[1:], "trainer.epochs=1")
        assert done.status == 0, done.text
    client = mlflow.MlflowClient(f"sqlite:///{Path.cwd()}/mlflow.db")
    runs = {run.data.tags["stream"]: run for run in client.search_runs(["1"])}
    assert set(runs) == {"my_blobs", "animals"}
    assert runs["my_blobs"].data.tags["strategy"] == "replay+calm"
    assert runs["my_blobs"].data.params["strategy.calm.strength"] == "0.1"
    for run in runs.values():
        assert run.data.metrics["train/calm_loss"] > 0
    assert [p.name for p in outside.glob("outputs/*/*/samples.txt")] or list(
        outside.glob("outputs/*/*/stream.json")
    )


def test_its_test_is_one(outside: Path) -> None:
    tests = runpy.run_path(str(outside / "test_calm.py"))
    tests["test_its_term_is_the_formula"]()
    (outside / "calm.py").write_text((outside / "calm.py").read_text().replace(".square()", ".abs()"))
    sys.modules.pop("calm")
    with pytest.raises(AssertionError):
        runpy.run_path(str(outside / "test_calm.py"))["test_its_term_is_the_formula"]()


def test_a_builder_that_does_not_say_what_it_builds_is_refused(outside: Path, command: Command) -> None:
    file = outside / "my_blobs.py"
    file.write_text(file.read_text().replace(" -> Stream:", ":"))
    done = command("--config-dir", "my_conf", "stream=my_blobs", "describe=true")
    assert (done.status, "stream._target_" in done.text) == (2, True), done.text
