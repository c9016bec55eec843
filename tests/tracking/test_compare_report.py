"""The page opens from a file, shows what it is given, runs nothing of it, and loads nothing."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from cl_moe.tracking.compare.export import latex, write_csv, write_latex
from cl_moe.tracking.compare.figures import draw_figures
from cl_moe.tracking.compare.match import Match, match_arms
from cl_moe.tracking.compare.report import write_report
from cl_moe.tracking.compare.whole import View
from cl_moe.tracking.figures.matrix import seen_average
from tests.tracking.comparisons import FEW, arms_of, run_of, view_of

EVIL = '</script><script>document.title="owned"</script><img src=x onerror=alert(1)> & "\'% _'
METRICS = {
    "stream/forgetting": 0.2,
    "stream/learning_accuracy": 0.7,
    "stream/forgetting_weights": 0.3,
    "stream/forgetting_routing": -0.1,
    "cost/seconds": 3.0,
}


class Page(HTMLParser):
    """Tags with their attributes, in order, and the texts of scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inside: dict[str, list[str]] = {}
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.cdata_elem is not None:  # within a script or a style
            self.inside.setdefault(self.cdata_elem, []).append(data)

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def page_of(
    views: Sequence[View], path: Path, match: Match | None = None
) -> tuple[Page, list[dict[str, Any]]]:
    html = write_report(views, ["a note"], "my <experiment>", FEW, match, path).read_text("utf-8")
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)
    assert data
    return Page(html), json.loads(data[1])["streams"]


def many(num: int, T: int = 3, experts: int = 0, **about: str) -> View:
    runs = [run_of(f"arm {k}", init, value=0.1 * k + init, metrics=METRICS, **about)
            for k in range(num) for init in (0, 1)]  # fmt: skip
    return view_of(arms_of(runs), T, experts)


@pytest.mark.parametrize(("num", "T", "experts"), [(1, 1, 0), (1, 3, 4), (40, 20, 200)])
def test_the_numbers_are_there(num: int, T: int, experts: int, tmp_path: Path) -> None:
    view = many(num, T, experts)
    page, (stream,) = page_of([view], tmp_path / "report.html")
    assert len(stream["arms"]) == num
    assert len(stream["curves"]["panels"]) == 1 + T
    stack = np.stack([seen_average(run.matrix.scores.numpy())[1:] for run in view.left if run.arm == "arm 0"])
    curve = stream["curves"]["panels"][0]["series"][0]
    np.testing.assert_allclose(curve["mean"], stack.mean(0), rtol=1e-5)
    np.testing.assert_allclose(np.array(curve["high"]) - curve["low"], np.ptp(stack, axis=0), rtol=1e-4)
    assert sum("data-arm" in attributes for attributes in page.attributes("tr")) == num
    assert stream["parts"][0] == [0.3, -0.1]
    if experts:
        (first, *_) = stream["loads"]
        np.testing.assert_allclose(np.mean(first["rows"], axis=0), 1.0, rtol=0.02)  # in even shares
        assert len(first["rows"]) == min(experts, 64)
        # the number beside the first row is the one in its name
        assert re.search(r"\d+$|(?<=group )\d+", first["experts"][0])[0] == str(first["first"])  # type: ignore[index]
    else:
        assert stream["loads"] is None


def test_language_counts_the_other_way(tmp_path: Path) -> None:
    runs = [run_of(arm, value=None, metrics={"stream/average_loss": 2.0}) for arm in ("naive", "lwf")]
    view = view_of(arms_of(runs))
    _, (stream,) = page_of([view], tmp_path / "report.html")
    assert stream["curves"]["lower"]
    np.testing.assert_allclose(stream["matrices"][0]["rows"], -view.left[0].matrix.scores.numpy(), rtol=1e-5)


def test_without_artifacts_and_metrics_the_table_stays(tmp_path: Path) -> None:
    view = view_of(arms_of([run_of("naive", value=None), run_of("lwf", value=None)]))._replace(left=[])
    page, (stream, _) = page_of([view, many(1)], tmp_path / "report.html")
    assert stream["curves"] is stream["loads"] is stream["parts"] is None
    assert len(page.attributes("section")) == 2


def test_names_are_text_and_nothing_else_runs(tmp_path: Path) -> None:
    arms = arms_of([run_of(f"{EVIL} {k}", metrics=METRICS) for k in range(2)])
    view = view_of(arms)
    view = view._replace(comparison=view.comparison._replace(stream=EVIL), notes=[EVIL])
    page, (stream,) = page_of([view], tmp_path / "report.html")
    assert stream["arms"][0]["name"] == f"{EVIL} 0"
    assert page.attributes("img") == []
    scripts = page.attributes("script")
    assert [script.get("type") for script in scripts] == ["application/json", None]
    assert not any("src" in one or "href" in one or "onerror" in one for _, one in page.tags)
    (policy,) = (
        str(meta["content"]) for meta in page.attributes("meta")
        if meta.get("http-equiv") == "Content-Security-Policy"
    )  # fmt: skip
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy
    assert "http" not in policy
    for kind, text in (("script", page.inside["script"][-1]), ("style", page.inside["style"][0])):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy


def test_the_page_is_the_same_each_time_and_small(tmp_path: Path) -> None:
    first, second = (write_report([many(6, 5, 16)], [], "x", FEW, None, tmp_path / name) for name in "ab")
    assert first.read_bytes() == second.read_bytes()
    assert first.stat().st_size < 150_000


def test_latex_prints_names_as_they_are(tmp_path: Path) -> None:
    view = many(3)
    rows = [row._replace(arm=EVIL) for row in view.comparison.rows]
    text = write_latex(
        [view.comparison._replace(rows=rows, stream="a\n\\b")], FEW, tmp_path / "a.tex"
    ).read_text()
    body = text[text.index(r"\begin{tabular}") :]
    lines = [line for line in body.splitlines() if line.endswith(r"\\")]
    columns = re.search(r"\\begin\{tabular\}\{(\w+)\}", body)
    assert columns
    for line in lines:
        assert len(re.findall(r"(?<!\\)&", line)) == len(columns[1]) - 1
        assert not re.findall(r"(?<!\\)[%#_]|<|>", line)
    assert len(lines) == 4
    assert text.count("\n\\b") == text.count("\n\\begin") + text.count(
        "\n\\bottomrule"
    )  # a comment stays one
    assert latex("{}") == r"\{\}"


def test_csv_has_a_line_per_arm(tmp_path: Path) -> None:
    view = many(40)
    path = write_csv([view.comparison], tmp_path / "summary.csv")
    assert len(path.read_text().splitlines()) == 41


@pytest.mark.parametrize("experts", [0, 6])
def test_figures_are_written_twice(experts: int, tmp_path: Path) -> None:
    view = many(4 if experts else 1, 2, experts)
    written = draw_figures(view.left, view.arms, tmp_path)
    names = ("accuracy_matrix", "expert_load", "forgetting_curves", "forgetting_parts", "pareto")
    for suffix in ("png", "svg"):
        assert sorted(path.stem for path in written if path.suffix == f".{suffix}") == list(names)
    before = {path: path.read_bytes() for path in written}
    for path, content in before.items():
        assert b"<svg" in content if path.suffix == ".svg" else imread(path)[..., :3].std() > 0.01
    draw_figures(view.left, view.arms, tmp_path)
    assert {path: path.read_bytes() for path in written} == before


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
in_browser = pytest.mark.skipif(
    BROWSER is None, reason="no Chromium or Chrome is installed (Debian: apt install chromium)"
)
HAND = """<script>
const say = {}, all = (where) => [...document.querySelectorAll(where)];
const names = (rows) => rows.map((row) => row.cells[0].textContent);
const names_now = () => names(all(".rows tbody tr")), curves = () => all(".curves .curve").length;
const head = all(".rows th").find((cell) => cell.textContent === "accuracy").firstChild;
say.before = names_now();
head.click();
say.up = names_now();
head.click();
say.down = names_now();
say.all = curves();
all(".chips button")[1].click();
say.three = curves();
say.hidden = names(all(".rows tbody tr").filter((row) => row.hidden));
const type = (words) => {
  document.querySelector(".filter").value = words;
  document.querySelector(".filter").dispatchEvent(new Event("input"));
};
type("Arm 2");
say.one = curves();
type("");
say.again = curves();
const drawing = document.querySelector(".curves svg"), box = drawing.getBoundingClientRect();
const end = { clientX: box.right - 12, clientY: box.top + 20 };
drawing.dispatchEvent(new PointerEvent("pointermove", end));
say.tip = document.querySelector(".tip").textContent;
document.querySelector(".panels").value = 2;
document.querySelector(".panels").dispatchEvent(new Event("change"));
say.ticks = all(".curves text").map((one) => one.textContent);
say.experts = all(".loads text").map((one) => one.textContent);
say.first = data.streams[0].loads[0].experts[0];
document.body.dataset.said = JSON.stringify(say);
</script>"""


def opened(path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """The page as the browser has it after its script ran."""
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command += [f"--user-data-dir={path.parent}/profile", "--virtual-time-budget=5000"]
    command += ["--window-size=1200,1600", *options, "--dump-dom", path.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@in_browser
def test_sorting_hiding_filtering_hovering(tmp_path: Path) -> None:
    """By a hand in the page: for it, the policy that would stop it is taken out."""
    view = many(4, 3, experts=5)
    path = write_report([view], [], "x", FEW, None, tmp_path / "report.html")
    page = re.sub(r"<meta http-equiv[^>]*>", "", path.read_text()).replace("</body>", f"{HAND}</body>")
    path.write_text(page)
    said = json.loads(str(Page(opened(path).stdout).attributes("body")[0]["data-said"]))
    means = {row.arm: row.metrics["stream/average_accuracy"].mean for row in view.comparison.rows}
    assert said["before"] == list(means)
    assert said["up"] == sorted(means, key=lambda arm: means[arm])
    assert said["down"] == said["up"][::-1]
    assert (said["all"], said["three"], said["one"], said["again"]) == (4, 3, 1, 4)
    assert said["hidden"] == [view.comparison.rows[1].arm]
    ends = {run: float(run[:5]) for run in said["tip"].split("\n")[1:]}
    expected = {
        arm: np.mean([run.matrix.scores[-1].mean() for run in view.left if run.arm == arm]) for arm in means
    }
    assert {line[7:]: value for line, value in ends.items()} == pytest.approx(expected, abs=6e-4)
    assert list(ends.values()) == sorted(ends.values(), reverse=True)
    assert said["first"] == "expert 0"
    assert said["experts"][:5] == list("01234")  # ids begin at 0, on the axis too
    assert "0" in said["ticks"]  # the curve of one experience begins before training


@in_browser
def test_in_a_browser(tmp_path: Path) -> None:
    """The script draws every curve, and neither a name nor a note runs."""
    runs = [run_of(f"{EVIL} {k}", init, metrics=METRICS) for k in range(4) for init in (0, 1)]
    view = view_of(arms_of(runs), 5, 8)
    match = Match("cost/seconds")
    view = view._replace(comparison=match_arms(view.comparison, view.arms, match, {}, 1, FEW), notes=[EVIL])
    path = write_report([view, many(2, 1)], [EVIL], EVIL, FEW, match, tmp_path / "report.html")
    shot = tmp_path / "shot.png"
    done = opened(path, f"--screenshot={shot}")
    page = Page(done.stdout)
    assert 'data-ready="true"' in done.stdout, done.stderr[-2000:]
    drawn = [attributes for _, attributes in page.tags if attributes.get("class") == "curve"]
    assert len([one for one in drawn if len(str(one.get("d", ""))) > 40]) == 4  # five points each
    assert len(page.attributes("circle")) >= 2 * (4 + 8) / 2
    assert len([one for one in page.attributes("rect") if one.get("class") == "cell"]) >= 6 * 5 + 8 * 5
    assert page.attributes("img") == []
    assert "<title>owned" not in done.stdout
    pixels = imread(shot)[..., :3]
    for colour in ((0, 0x72, 0xB2), (0xD5, 0x5E, 0)):  # the first arms' lines
        assert (np.abs(pixels * 255 - np.array(colour)).max(axis=-1) < 3).sum() > 50
