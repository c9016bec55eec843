"""Figures show what they should, draw without warnings, and touch no global state."""

from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from cl_moe.errors import InputError
from cl_moe.layers.routing import ExpertLoad
from cl_moe.tracking import figures
from cl_moe.tracking.figures.matrix import growth_events, seen_average
from cl_moe.tracking.record import Record


def record_of(T, kind="classification", rows=None, sizes=((1, 4, 2),), long=False):
    """A run whose layers (block, experts, newborns) grow at every second boundary and freeze the past."""
    random = np.random.default_rng(T)
    record = Record(kind, [f"{'a_long_name_of_an_experience_' * long}{j}" for j in range(T)])
    for i in range(T + 1 if rows is None else rows):
        row = random.uniform(0, 1, T)
        record.rows.append(torch.from_numpy(row if kind == "classification" else row - 5))
        loads, cohorts = {}, {}
        for block, first, newborns in sizes:
            cohorts[block] = [(first, 0, i > 1), *((newborns, b, b < i - 1) for b in range(1, i, 2))]
            N = sum(size for size, _, _ in cohorts[block])
            counts = [torch.from_numpy(random.integers(0, 9, N)) for _ in range(T)]
            loads[block] = [ExpertLoad(count.double() / 2, count, count.sum()) for count in counts]
        record.loads.append(loads)
        record.cohorts.append(cohorts)
    return record


def corners(figure):
    """Tight boxes of the texts that must not overlap: tick labels of every axes and titles."""
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    for axes in figure.findobj(lambda artist: hasattr(artist, "get_xticklabels")):
        labels = [label for label in axes.get_yticklabels() if label.get_text() and label.get_visible()]
        if axes.get_visible():
            yield [label.get_window_extent(renderer) for label in labels]


CASES = [
    record_of(1),
    record_of(2, rows=1),
    record_of(5),
    record_of(5, rows=3, sizes=()),
    record_of(4, "language", long=True),
    record_of(20, long=True, sizes=((0, 100, 20), (2, 8, 2))),
    record_of(30, sizes=()),
]


@pytest.mark.parametrize("record", CASES, ids=lambda record: f"{record.kind}-{len(record.names)}")
def test_files_are_drawn_and_not_blank(record, tmp_path):
    written = figures.write_figures(record, tmp_path / "figures")
    names = ["accuracy_matrix.png", "forgetting_curves.png", "expert_load.png"]
    assert [path.name for path in written][:3] == names
    for path in written:
        image = imread(path)[..., :3]
        assert image.std() > 0.02
        assert image.shape[0] > 300
        assert image.shape[1] > 500


def test_no_global_state():
    """Drawing needs no pyplot; asked in a fresh process, since torchmetrics imports it."""
    code = "import sys, cl_moe.tracking.figures; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("record", [CASES[2], CASES[5]], ids=["5", "20"])
def test_labels_do_not_overlap(record):
    for draw in (figures.accuracy_matrix, figures.forgetting_curves, figures.expert_load):
        for boxes in corners(draw(record)):
            for first, second in itertools.pairwise(sorted(boxes, key=lambda box: box.y0)):
                assert first.y1 <= second.y0 + 1


def test_matrix_says_what_it_shows():
    axes, bar = figures.accuracy_matrix(CASES[2]).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "before training",
        *(f"{i + 1}: {i}" for i in range(5)),
    ]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1", "2", "3", "4"]
    np.testing.assert_array_equal(axes.images[0].get_array(), CASES[2].matrix)
    assert axes.images[0].get_clim() == (0, 1)
    assert sorted(text.get_text() for text in axes.texts) == sorted(
        f"{v:.2f}" for v in CASES[2].matrix.flatten()
    )
    assert "accuracy" in bar.get_ylabel()


def test_language_is_shown_as_loss():
    axes, bar = figures.accuracy_matrix(CASES[4]).axes
    np.testing.assert_array_equal(axes.images[0].get_array(), -CASES[4].matrix)
    assert "nats" in bar.get_ylabel()
    assert "nats" in figures.forgetting_curves(CASES[4]).axes[-1].get_ylabel()


def test_curves():
    record = CASES[2]
    figure = figures.forgetting_curves(record)
    strip, axes = figure.axes
    assert axes.get_xlabel() == "experiences trained"
    assert "accuracy" in axes.get_ylabel()
    labelled = {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}
    assert len(labelled) == 5 + 1
    for j in range(5):
        line = labelled[f"{j + 1}: {j}"]
        assert list(line.get_xdata()) == list(range(j + 1, 6))
        np.testing.assert_array_equal(line.get_ydata(), record.matrix[j + 1 :, j])
    np.testing.assert_array_equal(
        labelled["average of those trained"].get_ydata(), seen_average(record.matrix.numpy())
    )
    assert {(text.get_position()[0], text.get_text()) for text in strip.texts} == {
        (1, "+2"),
        (1, "4"),
        (2, "2"),
        (3, "+2"),
        (4, "2"),
    }


def test_events_are_read_from_the_cohorts():
    assert growth_events(CASES[2]) == {1: (2, 4), 2: (0, 2), 3: (2, 0), 4: (0, 2)}
    assert growth_events(CASES[3]) == {}
    assert len(figures.forgetting_curves(CASES[3]).axes) == 1


def test_average_of_the_experiences_trained():
    R = np.array([[0.0, 0.0], [0.5, 0.1], [0.25, 0.75]])
    np.testing.assert_array_equal(seen_average(R), [np.nan, 0.5, 0.5])


def test_load_of_few_experts_is_drawn_by_expert():
    record = CASES[2]
    figure = figures.expert_load(record)
    (part,) = figure.subfigs
    load = np.stack([load.score.numpy() for load in record.loads[-1][1]], axis=1)
    np.testing.assert_allclose(part.axes[0].images[0].get_array(), load / load.sum(0) * len(load))
    title = part.get_suptitle()
    assert "usage" in title
    assert "unevenness" in title
    names = [label.get_text() for label in part.axes[0].get_yticklabels()]
    assert names == ["4 from the start, frozen", "2 born after 1, frozen", "2 born after 3, frozen"]


def test_load_of_many_experts_is_drawn_by_cohort():
    record = CASES[5]
    part = figures.expert_load(record).subfigs[0]
    heat, rank = part.axes[:2]
    shares = heat.images[0].get_array()
    assert shares.shape == (len(record.cohorts[-1][0]), 20)
    np.testing.assert_allclose(shares.sum(axis=0), 1)
    curve = rank.lines[0].get_ydata()
    assert (np.diff(curve) <= 0).all()
    assert rank.get_yscale() == "log"


def test_a_dense_model_gets_a_page_that_says_so():
    assert "no expert layers" in figures.expert_load(CASES[3]).texts[0].get_text()


def test_the_same_figure_gives_the_same_bytes(tmp_path):
    first, second = (figures.save(figures.accuracy_matrix(CASES[0]), tmp_path / name) for name in "ab")
    assert first.read_bytes() == second.read_bytes()


class TestArms:
    arms = {  # noqa: RUF012
        "naive": [record_of(3).matrix.numpy() * share for share in (0.8, 0.9, 1)],
        "an arm with a rather long name, grown and frozen": [record_of(3).matrix.numpy()],
    }

    def test_curves(self):
        figure = figures.compare_curves(self.arms, ["x", "y", "z"])
        top, *panels = figure.axes
        assert len(panels) == 3
        for axes in panels:
            assert len(axes.collections) == 1  # the band of the arm with several runs
        naive = top.lines[0]
        expected = np.mean([seen_average(R)[1:] for R in self.arms["naive"]], axis=0)
        np.testing.assert_allclose(naive.get_ydata(), expected)
        assert [text.get_text() for text in figure.legends[0].get_texts()] == [
            "naive (3 runs)",
            list(self.arms)[1],
        ]

    def test_matrices(self):
        figure = figures.compare_matrices(self.arms)
        shown = figure.axes[0].images[0].get_array()
        np.testing.assert_allclose(shown, np.mean(self.arms["naive"], axis=0))

    def test_loads(self):
        arms = {
            "a": {1: [np.array([1.0, 3.0, 0.0])], 4: [np.ones(200), np.arange(100.0)]},
            "b": {1: [np.ones(8)] * 2},
            "dense": {},
        }
        figure = figures.compare_loads(arms)
        assert len(figure.axes) == 4
        dots = figure.axes[1].lines
        np.testing.assert_allclose(
            dots[0].get_xdata(), [np.log(3) + 0.25 * np.log(0.25) + 0.75 * np.log(0.75)]
        )
        assert "usage 66.7%" in figure.axes[1].get_yticklabels()[0].get_text()

    def test_pictures(self, tmp_path):
        many = {f"arm {n}": [-4 * record_of(20).matrix.numpy()] for n in range(9)}
        for figure in (
            figures.compare_curves(many, kind="language"),
            figures.compare_matrices(many, kind="language"),
            figures.compare_curves({"one": [record_of(1).matrix.numpy()] * 2}),
        ):
            assert imread(figures.save(figure, tmp_path / "f.png"))[..., :3].std() > 0.02

    @pytest.mark.parametrize("arms", [{}, {"a": []}, {"a": [np.zeros((3, 2))], "b": [np.zeros((4, 3))]}])
    def test_what_does_not_fit_is_refused(self, arms):
        for draw in (figures.compare_curves, figures.compare_matrices):
            with pytest.raises(InputError, match="arms"):
                draw(arms)
        with pytest.raises(InputError, match="names"):
            figures.compare_curves(self.arms, ["x"])
        page = figures.compare_loads({"a": {}})
        assert "No arm has expert layers" in page.texts[0].get_text()
