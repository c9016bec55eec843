"""What people look at is drawn: MLflow's chart view of a sweep, and the report of its comparison."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from matplotlib.image import imread
from mlflow import MlflowClient

from cl_moe.tracking import compare


def load(name: str) -> ModuleType:
    """A program beside the tests."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


browser = load("browser")
needs_chromium = pytest.mark.skipif(
    browser.chromium() is None,
    reason=f"no browser: one of {', '.join(browser.NAMES)} is needed (apt install chromium)",
)


@pytest.fixture(scope="module")
def swept(command_in: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with a sweep of two arms and two seeds."""
    folder = tmp_path_factory.mktemp("swept")
    small = (
        "trainer.epochs=1",
        "stream.tune_on_first=3",
        "model.width=16",
        "layer.hidden=8",
        "layer=dense,moe",
    )
    done = command_in(
        folder, "-m", *small, "seed.init=0,1", "hydra.sweep.dir=sweep", "tracking.uri=sqlite:///mlflow.db"
    )
    assert done.status == 0, done.text
    return folder


def not_blank(path: Path) -> bool:
    """Whether a picture has many colours, each of them somewhere."""
    pixels = (255 * imread(path)[..., :3]).astype(int)
    return len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50


@pytest.mark.slow
@needs_chromium
def test_mlflows_chart_view_draws_the_curves_of_a_sweep(swept: Path, tmp_path: Path):
    with browser.mlflow_server(f"sqlite:///{swept}/mlflow.db") as address:
        url = address + browser.CHARTS.format(experiment=1, view="arms")
        page = browser.document(url)
        assert "accuracy/experience_00" in page
        assert "Group by: arm" in page
        shot = browser.picture(url, tmp_path / "charts.png")
        each = browser.document(address + browser.CHARTS.format(experiment=1, view="runs"))
    drawn = browser.curves(page)
    assert len([points for points in drawn if points == 4]) >= 6, "two arms over three experiences"
    assert not_blank(shot)
    assert len([points for points in browser.curves(each) if points == 4]) >= 12, "and two seeds"
    runs = MlflowClient(f"sqlite:///{swept}/mlflow.db").search_runs(["1"], "tags.sweep != 'none'")
    assert browser.strokes(each) == {run.data.tags["mlflow.runColor"] for run in runs}, "a colour per arm"


@pytest.mark.slow
@needs_chromium
def test_the_report_draws_its_curves_from_a_file(swept: Path, tmp_path: Path):
    compare.main(["--uri", f"sqlite:///{swept}/mlflow.db", "--out", str(tmp_path), "--resamples", "100"])
    url = (tmp_path / "report.html").as_uri()
    drawn = browser.curves(browser.document(url, seconds=20))
    assert drawn == [3, 3], "the average of both arms after each experience"
    assert not_blank(browser.picture(url, tmp_path / "report.png", seconds=20))


def test_curves_are_told_from_frames():
    page = '<path class="js-line" style="fill: none; stroke: rgb(136, 34, 85);" d="M1,2L3,4L5,6"></path>'
    page += '<path class="axis" d="M1,2L3,4"></path>'
    page += '<path d="M0 1L2 3" fill="none" class="curve"></path><path d="M0 4H26"></path>'
    assert browser.curves(page) == [3, 2]
    assert browser.strokes(page) == {"#882255"}
    assert browser.curves("<p>No charts in this section</p>") == []
