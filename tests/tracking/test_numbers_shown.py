"""What is shown of a stream of numbers: losses in squared errors, never nats, accuracies or perplexities."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from cl_moe.experiment import run_experiment
from cl_moe.growth import EveryExperience
from cl_moe.measuring import Measuring
from cl_moe.stream import Stream
from cl_moe.tracking import figures, overview
from cl_moe.tracking.compare.arms import kind_of
from cl_moe.tracking.compare.table import main_metric
from cl_moe.tracking.compare.whole import compare
from cl_moe.tracking.figures import style
from cl_moe.tracking.figures.gap import stability_gap
from cl_moe.tracking.figures.parts import forgetting_parts
from cl_moe.tracking.record import Record
from cl_moe.tracking.tracker import MLflowTracker
from tests.number_runs import numbers, run_of
from tests.tracking.comparisons import arms_of
from tests.tracking.comparisons import run_of as run_found

LOSS = "stream/average_loss"


def words(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(Text))


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Record:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "write_figures", lambda record, folder: [])
        measuring = Measuring("always", every=4)
        run = run_of(
            tmp_path_factory.mktemp("run"), layer="moe", growth=EveryExperience(2), measuring=measuring
        )
        run_experiment(run)
    return run.measured


DRAWN = (figures.accuracy_matrix, figures.forgetting_curves, forgetting_parts, stability_gap)


@pytest.mark.parametrize("draw", DRAWN, ids=lambda draw: draw.__name__)
def test_a_figure_names_squared_errors(draw, record: Record) -> None:
    shown = words(draw(record))
    assert "squared error" in shown
    for other in ("nats", "accuracy", "share correct"):
        assert other not in shown


def test_the_matrix_shows_losses(record: Record) -> None:
    axes = figures.accuracy_matrix(record).axes[0]
    np.testing.assert_array_equal(axes.images[0].get_array(), -record.matrix)
    assert style.scale("regression").limits is None, "errors have no upper end"


def test_all_files_are_drawn(record: Record, tmp_path: Path) -> None:
    assert all(path.stat().st_size > 1000 for path in figures.write_figures(record, tmp_path))


def test_arms_are_compared_by_their_squared_errors(uri: str, tmp_path: Path, monkeypatch) -> None:
    for seed in (0, 1):
        for layer in ("dense", "moe"):
            tags = {"arm": layer, "stream": "maps", "kind": "regression", "scenario": "domain"}
            tags |= {"seed.init": str(seed), "seed.order": "natural", "seed.data": "0", "layer": layer}
            with monkeypatch.context() as patch:
                patch.setattr(figures, "write_figures", lambda record, folder: [])
                folder = tmp_path / f"{layer}{seed}"
                run = run_of(folder, layer=layer, seed=seed, tracker=MLflowTracker(uri), tags=tags)
                run_experiment(run)
    said: dict[str, str] = {}
    save = figures.save

    def reading(figure: Figure, path: Path) -> Path:
        said[path.stem] = words(figure)
        return save(figure, path)

    monkeypatch.setattr(figures, "save", reading)
    found = compare(uri, group_by=("arm",), out=tmp_path / "compared")
    (one,) = found.comparisons
    assert one.metric == LOSS
    assert {row.arm: row.runs for row in one.rows} == {"dense": 2, "moe": 2}
    assert set(said) == {
        *("forgetting_curves", "accuracy_matrix", "expert_load", "pareto", "forgetting_parts")
    }
    for name in ("forgetting_curves", "accuracy_matrix", "forgetting_parts"):
        assert "squared error" in said[name], name
        assert "nats" not in said[name], name
    assert "loss just after learning (lower is better)" in said["pareto"]
    page = (tmp_path / "compared/report.html").read_text()
    assert "loss (squared error, lower is better)" in page
    assert "nats" not in page
    assert "share correct" not in page


def test_the_kind_of_arms_is_what_they_say_or_what_they_measured() -> None:
    loss = {"value": None, "metrics": {LOSS: 1.0}}
    cases = {
        "regression": arms_of([run_found(**loss, kind="regression")]),
        "language": arms_of([run_found(**loss)]),
        "classification": arms_of([run_found()]),
    }
    for kind, arms in cases.items():
        assert kind_of(arms) == kind
        assert main_metric(arms) == (LOSS if kind != "classification" else "stream/average_accuracy")


@pytest.fixture
def stream() -> Stream:
    return numbers(sizes=(20, 12), targets=2)


def test_a_description_tells_mean_and_spread_of_targets(stream: Stream, tmp_path: Path) -> None:
    told = overview.describe(stream)
    assert (told["kind"], told["num_classes"]) == ("regression", 0)
    lines = overview.table(stream)
    assert lines[0] == "maps: 2 experiences, regression, scenario domain, inputs 4"
    for experience, entry, line in zip(stream, told["experiences"], lines[1:], strict=True):
        for side, data in (("train", experience.train), ("test", experience.test)):
            targets = data.tensors[1].double().numpy()
            assert entry[f"{side}_targets"]["mean"] == pytest.approx(targets.mean())
            assert entry[f"{side}_targets"]["std"] == pytest.approx(targets.std())
        spread = entry["train_targets"]
        assert f"targets {spread['mean']:>9.4g} ± {spread['std']:.4g}" in line
        assert entry["classes"] == []
    written = overview.write_overview(stream, tmp_path)
    assert [path.name for path in written] == ["stream.json", "samples.txt"]
    assert json.loads(written[0].read_text()) == told
    first = stream[0].train.tensors[1][0].tolist()
    assert f"[{first[0]:g} {first[1]:g}] " in written[1].read_text()
