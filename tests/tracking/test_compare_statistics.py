"""The pure parts of the comparison: statistics against scipy, choices, and what the table shows."""

import io
import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from scipy import stats

from cl_moe.tracking.compare_runs import Arm, Run, by_stream, choose_baseline, lower_is_better
from cl_moe.tracking.compare_statistics import paired_difference, spread
from cl_moe.tracking.compare_table import compare_arms, score_table, short

numbers = st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=8)


@given(numbers, numbers)
@settings(deadline=None)
def test_paired_difference_is_the_paired_t_test(ours: list[float], baseline: list[float]) -> None:
    num = min(len(ours), len(baseline))
    a, b = dict(enumerate(ours)), dict(enumerate(baseline))
    got = paired_difference(a, b, 0.9)
    x = np.array(ours[:num]) - np.array(baseline[:num])
    assert got.pairs == num
    np.testing.assert_allclose(got.mean, x.mean(), atol=1e-9)
    if x.std() > 1e-6:
        low, high = stats.t.interval(0.9, num - 1, x.mean(), stats.sem(x))
        np.testing.assert_allclose([got.low, got.high], [low, high], rtol=1e-6, atol=1e-9)


def test_differences_without_an_interval() -> None:
    one = paired_difference({1: 2.0, 2: 5.0}, {1: 1.5, 3: 1.0})
    assert (one.mean, one.pairs) == (0.5, 1)
    assert math.isnan(one.low)
    none = paired_difference({1: 2.0}, {2: 1.0})
    assert none.pairs == 0
    assert math.isnan(none.mean)


def test_spread_of_few() -> None:
    assert spread([1.0])[::2] == (1.0, 1)
    assert math.isnan(spread([1.0]).std)
    assert math.isnan(spread([]).mean)


def _run(arm: str, seed: str, **about: str) -> Run:
    return Run(
        "id", 0, {"arm": arm, "seed.init": seed, "seed.order": "0", "seed.data": seed, **about}, {"m": 1.0}
    )


def test_baseline() -> None:
    grow = Arm("grow", [_run("grow", "0", strategy="naive", growth="at")])
    static = Arm("static", [_run("static", "0", strategy="naive", growth="never")])
    naive = Arm("naive", [_run("naive", "0", strategy="naive", growth="never")])
    assert choose_baseline([grow, static, naive], None) is naive
    assert choose_baseline([grow, static], None) is static
    assert choose_baseline([grow], None) is grow
    assert choose_baseline([grow, static], "grow") is grow
    assert choose_baseline([grow], "naive") is None


def test_several_runs_of_the_same_seeds_count_once() -> None:
    runs = [
        Run(str(k), k, {"seed.init": "0", "seed.data": "0", "seed.order": str(k // 2)}, {"m": k})
        for k in range(4)
    ]
    arm = Arm("both", runs)
    assert list(arm.values("m").values()) == [0.5, 2.5]
    assert (arm.num_seeds, arm.num_orders) == (1, 2)


def test_the_best_of_each_column_is_bold() -> None:
    good, bad = ({"stream/average_accuracy": x, "stream/forgetting": 1 - x} for x in (0.9, 0.4))
    about = {"seed.init": "0", "seed.order": "0", "seed.data": "0"}
    arms = [Arm("[a]", [Run("1", 0, about, bad)]), Arm("b", [Run("2", 0, about, good)])]
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    console.print(score_table(compare_arms("digits", arms, arms[0], None)))
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert re.findall(r"\x1b\[1m *([0-9.]+)", printed) == ["0.900", "0.100"]
    assert "[a]" in printed


@pytest.mark.parametrize("key", ["cost/tokens_per_second", "experts/usage", "stream/backward_transfer"])
def test_higher_is_better(key: str) -> None:
    assert not lower_is_better(key)


@pytest.mark.parametrize(
    ("value", "text"), [(9999.0, "9999"), (99.5, "99.5"), (10000.0, "10k"), (-2.5e9, "-2.5G"), (0.0, "0.000")]
)
def test_short(value: float, text: str) -> None:
    assert short(value) == text


def test_another_cut_is_another_stream_and_another_order_is_not():
    def run(number: int, **settings: str) -> Run:
        about = {"stream": "split_digits", "scenario": "class", "arm": "naive"}
        about |= {f"stream.{key}": value for key, value in settings.items()}
        return Run(str(number), number, about, {})

    same = [run(0, cut="1", order="None"), run(1, cut="1", order="[1, 0]", data_seed="3")]
    assert list(by_stream(same, ["arm"])) == ["split_digits (class)"]
    apart = by_stream([*same, run(2, cut="2", order="None")], ["arm"])
    assert list(apart) == ["split_digits (class) cut=1", "split_digits (class) cut=2"]
    assert [len(arm.runs) for arms in apart.values() for arm in arms] == [2, 1]
