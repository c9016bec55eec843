"""The pictures of the README, made from the runs of ``make demo``: ``make pictures``. No test.

The working folder has the demo's MLflow store and ``comparison/``; pictures go to ``docs/images``.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from browser import CHARTS, chromium, mlflow_server, picture
from mlflow import MlflowClient
from PIL import Image

COPIED = ("forgetting_curves.png", "expert_load.png")
MOST_BYTES = 300_000
WIDTH = 1200  # pixels
LEFT, RIGHT = 195, 1190  # of the window: without MLflow's menu and assistant


def shrink(source: Path, target: Path, box: tuple[int, int, int, int] | None = None) -> None:
    """A picture of at most 1,200 pixels and 300 kB: with fewer colours where it must."""
    image = Image.open(source).convert("RGB").crop(box)
    image.thumbnail((WIDTH, 10 * WIDTH), Image.Resampling.LANCZOS)
    for colours in (None, 256, 128, 64, 32):
        # coverage: the median cut gave two arms one orange, since thin curves are few pixels
        fewer = image if colours is None else image.quantize(colours, Image.Quantize.MAXCOVERAGE)
        fewer.save(target, optimize=True)
        if target.stat().st_size < MOST_BYTES:
            print(f"{target}: {target.stat().st_size:,} bytes")
            return
    raise SystemExit(f"{target} does not get below {MOST_BYTES:,} bytes")


def show_only(client: MlflowClient, experiment: str, charts: str) -> str:
    """The prepared view with those charts alone whose names match; returns its name."""
    state = json.loads(client.get_experiment(experiment).tags["mlflow.sharedViewState.runs"])
    text = json.dumps({**state, "chartsSearchFilter": charts})
    client.set_experiment_tag(experiment, "mlflow.sharedViewState.picture", text)
    return "picture"


def main(experiment: str, images: Path) -> None:
    """All of them, from the store and the comparison in the working folder."""
    if chromium() is None:
        raise SystemExit("got: no browser\nallowed: chromium or google-chrome\nchange: apt install chromium")
    uri, comparison = f"sqlite:///{Path('mlflow.db').absolute()}", Path("comparison")
    found = MlflowClient(uri).get_experiment_by_name(experiment)
    if found is None or not (comparison / "report.html").is_file():
        raise SystemExit(f"got: no runs of {experiment!r} here\nallowed: after make demo\nchange: the folder")
    for name in COPIED:
        shrink(comparison / name, images / name)
    with tempfile.TemporaryDirectory() as place, mlflow_server(uri) as address:
        shot = Path(place) / "shot.png"
        view = show_only(MlflowClient(uri), found.experiment_id, "loss/|stream/")
        url = address + CHARTS.format(experiment=found.experiment_id, view=view)
        picture(url, shot, (1600, 1300), 120)
        shrink(shot, images / "chart_view.png", (LEFT, 0, RIGHT, 1300))
        picture((comparison / "report.html").absolute().as_uri(), shot, (1300, 1500), 30)
        shrink(shot, images / "report.png")


if __name__ == "__main__":
    main(sys.argv[1], Path(__file__).resolve().parents[1] / "docs" / "images")
