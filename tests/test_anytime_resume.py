"""Points inside experiences stand once in MLflow, also where a run was killed between two of them."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from cl_moe.anytime import Anytime
from cl_moe.tracking import figures

RUN = (
    *("stream.tune_on_first=2", "trainer.epochs=2", "trainer.batch_size=100", "model.width=16"),
    *("eval.every=1", "eval.samples=20", "eval.window=6", "checkpoint.every_steps=3", "strategy=replay"),
)


def points(folder: Path) -> Counter:
    """(key, step, value) of all that is told of no clock, with how often it stands."""
    with sqlite3.connect(folder / "mlflow.db") as store:
        rows = store.execute("select key, step, value from metrics").fetchall()
    return Counter(
        row for row in rows if not any(word in row[0] for word in ("seconds", "memory", "_per_sec"))
    )


@pytest.mark.parametrize("killed_at", [2, *(pytest.param(at, marks=pytest.mark.slow) for at in (5, 9))])
def test_a_run_killed_inside_goes_on(
    killed_at: int,
    command_in: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(figures, "write_figures", lambda record, folder: [])
    through, broken = tmp_path / "through", tmp_path / "broken"
    original, calls = Anytime.points, []
    for folder in (through, broken):
        folder.mkdir()

    def failing(self: Anytime, *args: object) -> dict[str, float]:
        found = original(self, *args)  # type: ignore[arg-type]
        calls.append(found)
        if len(calls) == killed_at:
            raise KeyboardInterrupt
        return found

    assert command_in(through, *RUN, "hydra.run.dir=out").status == 0
    with monkeypatch.context() as patch:
        patch.setattr(Anytime, "points", failing)
        assert command_in(broken, *RUN, "hydra.run.dir=out").status != 0
    done = command_in(broken, "resume=out")
    assert done.status == 0, done.text
    for name in ("anytime.csv", "accuracy_matrix.csv"):
        assert (broken / "out" / name).read_bytes() == (through / "out" / name).read_bytes()
    found = points(broken)
    assert found == points(through)
    keys = {key for key, _, _ in found}
    assert {"anytime_accuracy/experience_00", "anytime_accuracy/experience_01"} <= keys
    assert {"stream/min_accuracy", "online_accuracy/experience_01", "stream/online_accuracy"} <= keys
    assert max(Counter((key, step) for key, step, _ in found.elements()).values()) == 1
