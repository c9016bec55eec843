"""Claims about curves through arms: fits against numpy and scipy, derived arms against plain sums."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import optimize, stats

from cl_moe.errors import InputError
from cl_moe.tracking.compare import fits
from cl_moe.tracking.compare.arms import Arm
from cl_moe.tracking.compare.claims import judge, read_claim
from cl_moe.tracking.compare.families import derive, family, read_derived
from cl_moe.tracking.compare.inside import trade_curve
from cl_moe.tracking.figures.families import families, learning, trade
from tests.tracking.comparisons import arms_of, run_of

X = np.array([16.0, 40.0, 100.0, 300.0, 900.0])
draw = np.random.default_rng(0)
NOISE = 0.05 * draw.normal(size=(4, 5))
LAW = 1.5 + 2.0 * X**-0.6


def arms(y_SP: np.ndarray = LAW + NOISE) -> list[Arm]:
    """An arm per x, a run per seed."""
    runs = []
    for (seed, place), y in np.ndenumerate(y_SP):
        metrics = {"stream/average_loss": float(y)}
        runs.append(run_of(f"n_{place}", seed, layer__num_experts=str(X[place]), metrics=metrics))
    return arms_of(runs)


def derived(text: str, of: list[Arm]) -> dict[str, list[float]]:
    arm = derive(read_derived(text, "x.yaml"), of)
    return {key: [run.metrics[key] for run in arm.runs] for key in arm.runs[0].metrics}


def test_a_trend_is_scipys_line_of_each_seed():
    found = derived("t = slope stream/average_loss over layer.num_experts of n_*", arms())
    want = [stats.linregress(np.log2(X), row).slope for row in LAW + NOISE]
    assert found["derived/slope"] == pytest.approx(want)


@pytest.mark.parametrize("y", [LAW + NOISE[0], (np.log(X) - 4) ** 2, -((np.log(X) - 4) ** 2)], ids=str)
def test_the_best_of_a_parabola_is_the_lowest_that_was_measured(y: np.ndarray):
    curve = np.polyfit(np.log(X), y, 2)
    grid = np.linspace(*np.log(X[[0, -1]]), 20_001)
    found = fits.parabola(X, y).values
    assert found["best"] == pytest.approx(np.polyval(curve, grid).min(), abs=1e-6)
    assert found["at"] == pytest.approx(np.exp(grid[np.polyval(curve, grid).argmin()]), rel=1e-3)


def test_a_power_law_is_as_good_as_scipys():
    y = LAW + 0.2 * NOISE[1]
    found = fits.power(X, y).values
    free, _ = optimize.curve_fit(lambda x, c, a, b: c + a * x**-b, X, y, p0=(1, 1, 1), maxfev=10_000)
    assert found["exponent"] == pytest.approx(free[2], rel=0.02)
    assert found["floor"] == pytest.approx(free[0], rel=0.02)
    residual = np.sqrt(((free[0] + free[1] * X ** -free[2] - y) ** 2).mean())
    assert found["residual"] == pytest.approx(residual, rel=1e-2)
    assert fits.power(X, X).values["exponent"] == 0, "what rises is no power law that falls"


def test_a_trend_can_be_claimed():
    trend = derive(read_derived("t = slope stream/average_loss over layer.num_experts of n_*", "x"), arms())
    assert judge(read_claim("t derived/slope below 0", "x"), [trend]).word == "reproduced"
    assert judge(read_claim("t derived/slope within 0 by 0.01", "x"), [trend]).word == "contradicted"
    assert judge(read_claim("t derived/slope within 0 by 9", "x"), [trend]).word == "reproduced"


def test_ratio_share_and_change():
    of = arms()
    low, mid, high = ((LAW + NOISE)[:, place] for place in (0, 1, 2))
    assert derived("r = ratio stream/average_loss of n_1 to n_0", of)["derived/ratio"] == pytest.approx(
        mid / low
    )
    kept = derived("k = kept stream/average_loss of n_1 from n_0 to n_2", of)["derived/share"]
    assert kept == pytest.approx((mid - low) / (high - low))
    metrics = {f"online_accuracy/experience_{e:02d}": float(e**2) for e in range(10)}
    long = arms_of([run_of("a", seed, metrics=metrics) for seed in range(2)])
    change = (64 + 81) / 2 - (0 + 1) / 2
    assert derived("c = change online_accuracy of a", long)["derived/change"] == [change, change]


def test_births_are_held_against_boundaries(tmp_path: Path):
    events = [
        {"act": act, "experience": e} for act, e in (("head", 0), ("grow", 4), ("grow", 4), ("grow", 5))
    ]
    (tmp_path / "ledger.json").write_text(json.dumps(events))
    (arm,) = arms_of([run_of("a")])
    arm = replace(arm, runs=[replace(run, artifacts=str(tmp_path)) for run in arm.runs])
    found = derived("b = births of a at 4,8", [arm])
    assert found == {"derived/missed": [1], "derived/false": [1], "derived/births": [2]}


def looked_into(folder: Path, name: str, rows: list[list[float]], flops: float = 1.0) -> Arm:
    """An arm of one run: every ten steps the losses on as many experiences as there are by then."""
    (folder / name).mkdir()
    lines = [f"{10 * (i + 1)},{j},{-loss}" for i, losses in enumerate(rows) for j, loss in enumerate(losses)]
    (folder / name / "anytime.csv").write_text("\n".join(["step,experience,score", *lines]))
    (found,) = arms_of([run_of(name, metrics={"cost/train_flops": flops, "cost/seconds": 1.0})])
    return replace(found, runs=[replace(run, artifacts=str(folder / name)) for run in found.runs])


def test_steps_to_an_equal_loss(tmp_path: Path):
    losses = {"slow": [4, 3, 2, 2.5], "fast": [3, 1, 1, 1], "never": [5, 5, 5, 5]}
    flops = {"slow": 1e3, "fast": 3e3, "never": 1e3}
    of = [looked_into(tmp_path, name, [[x] for x in losses[name]], flops[name]) for name in losses]
    found = derived("s = reach slow by fast", of)
    assert found["derived/share_of_steps"] == [pytest.approx(15 / 30)]
    assert found["derived/share_of_flops"] == [pytest.approx(1.5)]
    assert derived("s = reach slow by never", of)["derived/share_of_steps"] == [pytest.approx(40 / 30)]
    assert learning({"slow": [([10, 20], [4.0, 3.0])]}).axes


def test_what_is_forgotten_at_equal_learning(tmp_path: Path):
    slow = looked_into(tmp_path, "slow", [[2, 9], [1, 3], [1.5, 2.5, 4], [1.5, 2.7, 3]])
    fast = looked_into(tmp_path, "fast", [[2, 9], [1, 3], [2, 3, 3.5], [4, 5, 2.5], [9, 9, 2]])
    found = derived("m = match slow by fast", [slow, fast])
    assert found == {"derived/older": [pytest.approx(3.5)], "derived/older_of_base": [pytest.approx(2.1)]}
    with pytest.raises(InputError, match="no seed and order"):  # slow never learns what fast learns
        derived("m = match fast by slow", [slow, fast])
    (newest, older) = trade_curve(fast.runs[0])
    assert (newest, older) == ([3.5, 2.5, 2], [2.5, 4.5, 9])
    assert trade({"fast": [(newest, older)], "slow": [trade_curve(slow.runs[0])]}).axes
    with pytest.raises(InputError, match="one experience"):
        trade_curve(looked_into(tmp_path, "one", [[1], [2]]).runs[0])


def test_a_pair_that_lacks_an_arm_has_no_trend_and_a_figure_shows_every_run():
    of = arms()
    of[2] = replace(of[2], runs=of[2].runs[1:])
    one = read_derived("t = slope stream/average_loss over layer.num_experts of n_*", "x")
    assert len(derive(one, of).runs) == 3
    found = family(one, of)
    assert found is not None
    assert len(found.points) == 19
    assert families([found]).axes
    assert family(read_derived("r = ratio stream/average_loss of n_1 to n_0", "x"), of) is None


@pytest.mark.parametrize("text", [
    "t = slope stream/average_loss over layer.num_experts of m_*",
    "t = slope stream/average_loss over layer of n_*",
    "t = reach n_0 by n_1",
    "t = power stream/average_loss over layer.num_experts of n_0,n_1",
    "t = median stream/average_loss of n_0",
])  # fmt: skip
def test_what_cannot_be_derived(text: str):
    with pytest.raises(InputError):
        derived(text, arms())
