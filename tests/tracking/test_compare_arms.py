"""What is averaged with what: streams, definitions, code, configurations, pairs. And what the tables show."""

from __future__ import annotations

import io
import math
import re

import numpy as np
import pytest
from rich.console import Console

from cl_moe.errors import InputError
from cl_moe.tracking.compare.arms import (
    by_stream,
    choose_baseline,
    context_of,
    notes_on,
    without_common_words,
)
from cl_moe.tracking.compare.runs import Run, lower_is_better
from cl_moe.tracking.compare.table import (
    compare_arms,
    cost_table,
    difference_table,
    score_table,
    short,
    variance_table,
)
from tests.tracking.comparisons import ACCURACY, FEW, arms_of, grid, run_of


def test_baseline() -> None:
    grow, static, naive = arms_of(
        [run_of("grow", strategy="naive", growth="at"), run_of("static", strategy="naive"), run_of("naive")]
    )
    assert choose_baseline([grow, static, naive], None) is naive
    assert choose_baseline([grow, static], None) is static
    assert choose_baseline([grow], None) is grow
    assert choose_baseline([grow, static], "grow") is grow
    assert choose_baseline([grow], "naive") is None
    alone, plain, other = arms_of(
        [run_of("first try"), *(run_of("dense", init=seed) for seed in (1, 2)), run_of("moe", init=2)]
    )
    assert choose_baseline([alone, plain, other], None) is plain, "it has a partner, the first has none"


def test_another_cut_is_another_stream_and_another_order_is_not() -> None:
    same = [run_of(stream__cut="1"), run_of(init=1, stream__cut="1", stream__order="[1, 0]")]
    assert list(by_stream(same, ["arm"])[0]) == ["digits (class)"]
    apart = by_stream([*same, run_of(stream__cut="2")], ["arm"])[0]
    assert list(apart) == ["digits (class) cut=1", "digits (class) cut=2"]
    assert [len(arm.runs) for arms in apart.values() for arm in arms] == [2, 1]


@pytest.mark.parametrize(
    ("theirs", "title", "word"),
    [
        ({"definitions": "2"}, "digits (class) definitions=2", "definitions of the metrics"),
        ({"data_checksum": "beef"}, "digits (class) data=beef", "data"),
        ({"metrics": {"accuracy/experience_04": 0.1}}, "digits (class) experiences=5", "lengths"),
    ],
)
@pytest.mark.parametrize("mixed", [False, True])
def test_what_is_not_the_same_quantity_is_never_averaged(
    theirs: dict[str, str], title: str, word: str, mixed: bool
) -> None:
    ours = {"definitions": "1", "data_checksum": "cafe", "metrics": {"accuracy/experience_02": 0.3}}
    runs = [run_of(**ours), run_of(init=1, **{**ours, **theirs}), run_of(init=2, metrics=ours["metrics"])]  # type: ignore[arg-type]
    streams, notes = by_stream(runs, ["arm"], mixed)
    # a run that does not tell its data or its definitions goes with the others of before
    assert [len(arm.runs) for arms in streams.values() for arm in arms] == [2, 1]
    assert list(streams)[1] == title
    assert [note for note in notes if word in note and "never averaged" in note]


def test_data_are_held_against_those_of_the_same_order_and_data_seed() -> None:
    """Another order has other data; a run with other data than the rest of its order stands apart."""
    runs = [run_of(arm, 0, order, data_checksum=f"of {order}") for arm in "ab" for order in range(3)]
    assert list(by_stream(runs, ["arm"])[0]) == ["digits (class)"]
    streams, notes = by_stream([*runs, run_of("c", 0, 1, data_checksum="changed")], ["arm"])
    assert [len(arm.runs) for arms in streams.values() for arm in arms] == [3, 3, 1]
    assert list(streams)[1] == "digits (class) data=changed"
    assert "data are never averaged" in notes[0]


def test_an_arm_is_of_one_version_of_the_code_unless_mixed() -> None:
    old = [run_of(init=k, started=k, git_commit="a" * 40, value=0.0) for k in range(3)]
    new = [run_of(init=k, started=k, git_commit="b" * 40, value=1.0) for k in (3, 4)]
    other = run_of("lwf", git_commit="a" * 40, git_dirty="true")
    streams, notes = by_stream([*old, *new, other], ["arm"])
    naive, lwf = streams["digits (class)"]
    assert naive.spread(ACCURACY)[::2] == (1.0, 2)
    assert "counted 2 of bbbbbbbb, the newest, left out 3 of aaaaaaaa. --mixed" in notes[0]
    naive, lwf = by_stream([*old, *new, other], ["arm"], mixed=True)[0]["digits (class)"]
    assert naive.spread(ACCURACY)[::2] == (0.4, 5)
    said = " ".join(notes_on([naive, lwf], naive, ACCURACY))
    assert "several versions of the code" in said
    assert "aaaaaaaa changed is not known" in said
    same = by_stream(old, ["arm"])
    assert same[1] == notes_on(*[same[0]["digits (class)"]], None, ACCURACY) == []


def test_the_newest_of_the_same_seeds_counts() -> None:
    runs = [run_of(value=0.1, started=5), run_of(value=0.9, started=2), run_of(init=1, value=0.3)]
    streams, notes = by_stream(runs, ["arm"])
    assert streams["digits (class)"][0].spread(ACCURACY).mean == pytest.approx(0.2)
    assert "naive (1)" in notes[0]


def test_pairs_share_what_is_not_grouped_by() -> None:
    """Grouped by strategy, a dense run is held against a dense run, and a lonely one against none."""
    runs = [
        run_of(f"{layer} {strategy}", init, value=value + init, strategy=strategy, layer=layer)
        for layer, strategy, value in (("dense", "naive", 0), ("moe", "naive", 10), ("dense", "lwf", 3),
                                       ("moe", "lwf", 17), ("peer", "lwf", 99))
        for init in (0, 1)
    ]  # fmt: skip
    naive, lwf = arms_of(runs, ("strategy",))
    row = compare_arms("digits", [naive, lwf], naive, ACCURACY, FEW).rows[1]
    assert row.difference is not None
    assert (row.difference.mean, row.difference.pairs) == (5.0, 4)
    (note,) = (note for note in notes_on([naive, lwf], naive, ACCURACY) if "partner" in note)
    assert "layer=peer" in note


def test_configurations_that_are_averaged_are_named() -> None:
    arms = arms_of([run_of("mine", 0, trainer__epochs="1"), run_of("mine", 1, trainer__epochs="2")])
    assert notes_on(arms, None, ACCURACY) == [
        "Averages over runs of several configurations: mine in trainer.epochs (1, 2)."
    ]
    fixed = [run_of("mine", growth="at", growth__num_experts=n) for n in ("4", "8")]
    four, eight = arms_of(fixed, ("growth.num_experts",))  # no doubles: they are two groups
    assert (four.name, eight.name) == ("4", "8")


def test_gaps_are_named() -> None:
    runs = [run_of(init=k) for k in range(3)] + [run_of("lwf", 0), run_of("lwf", 1, value=None)]
    naive, lwf = arms_of(runs)
    gaps, partner = notes_on([naive, lwf], naive, ACCURACY)
    assert gaps == f"No finite {ACCURACY} in 1 of 2 runs of lwf: they are not in its means."
    assert "lwf lacks init=1 order=natural data=0, init=2 order=natural data=0" in partner


def test_common_words_are_left_out_of_names() -> None:
    arms = arms_of([run_of("moe naive a=1 b=2"), run_of("moe lwf a=1 b=3")])
    shown, common = without_common_words(arms)
    assert ([arm.name for arm in shown], common) == (["moe naive b=2", "moe lwf b=3"], "a=1")
    assert choose_baseline(shown, "moe lwf a=1 b=3") is choose_baseline(shown, "moe lwf b=3") is shown[1]
    for names in (("a=1",), ("a=1 b=2", "a=1"), ("x a=1", "x a=1 a=1"), ("k=1, l=2", "k=1, l=3")):
        alone = arms_of([run_of(name) for name in names])
        assert without_common_words(alone) == (alone, "")


def test_an_unknown_key_lists_the_known() -> None:
    with pytest.raises(InputError, match=r"seed\.init"):
        by_stream([run_of()], ["colour"])


def test_rows_against_numpy() -> None:
    random = np.random.default_rng(0)
    places = [(order, init) for order in "ab" for init in range(3)]
    ours, base = random.random(6), random.random(6)
    arms = arms_of(
        grid("lwf", dict(zip(places, ours, strict=True)))
        + grid("naive", dict(zip(places, base, strict=True)))
    )
    first, row = compare_arms("digits", arms, arms[1], None, FEW).rows
    assert (first.arm, first.difference) == ("naive", None)
    assert row.difference is not None
    np.testing.assert_allclose(row.difference.mean, (ours - base).mean())
    assert (row.seeds, row.orders, row.runs) == (3, 2, 6)
    worst = "ab"[int(ours.reshape(2, 3).mean(1).argmin())]
    assert row.worst_order == (worst, pytest.approx(ours.reshape(2, 3).mean(1).min()))


def test_p_values_are_adjusted_over_arms() -> None:
    better = {"naive": 0, "a": 1, "b": 2, "c": 0}
    arms = arms_of([run_of(arm, k, value=0.1 * k + more) for arm, more in better.items() for k in range(6)])
    rows = compare_arms("digits", arms, arms[0], None, FEW).rows
    found = [(row.difference.p, row.difference.p_holm) for row in rows if row.difference is not None]
    assert found == [(2 / 64, 6 / 64), (2 / 64, 6 / 64), (1.0, 1.0)]


def test_the_best_of_each_column_is_bold() -> None:
    good, bad = ({"stream/forgetting": 1 - x} for x in (0.9, 0.4))
    arms = arms_of([run_of("[a]", value=0.4, metrics=bad), run_of("b", value=0.9, metrics=good)])
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    console.print(score_table(compare_arms("digits", arms, arms[0], None, FEW)))
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert re.findall(r"\x1b\[1m *([0-9.]+)", printed) == ["0.900", "0.100"]
    assert "[a]" in printed


def test_forty_arms_with_long_names_fit_100_columns() -> None:
    names = [f"moe top_k every_experience past_experts lifelong_moe+replay lr={k}" for k in range(40)]
    keys = ("stream/forgetting", "stream/backward_transfer", "stream/forward_transfer", "cost/seconds",
            "cost/train_flops", "cost/params_total", "experts/usage", "experts/unevenness",
            "cost/params_active", "cost/peak_memory_bytes", "cost/buffer_bytes")  # fmt: skip
    metrics = {key: -0.123456 if "stream" in key else 1.23456e13 for key in keys}
    runs = [
        run_of(name, k, o, value=0.5 + k, metrics=metrics) for name in names for k in (0, 1) for o in "ab"
    ]
    arms = arms_of(runs)
    one = compare_arms("digits", arms, arms[0], None, FEW)
    console = Console(file=io.StringIO(), width=100)
    for table in (score_table, difference_table, variance_table, cost_table):
        console.print(table(one))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(map(len, map(str.rstrip, lines))) <= 100
    assert sum("…" in line for line in lines) == 0  # nothing is cut away


@pytest.mark.parametrize("key", ["cost/tokens_per_second", "experts/usage", "stream/backward_transfer"])
def test_higher_is_better(key: str) -> None:
    assert not lower_is_better(key)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (9999.0, "9999"),
        (99.5, "99.5"),
        (10000.0, "10k"),
        (-2.5e9, "-2.5G"),
        (0.0, "0"),
        (3e13, "3.00e13"),
    ],
)
def test_short(value: float, text: str) -> None:
    assert short(value) == text


def test_no_metrics_at_all() -> None:
    arms = arms_of([run_of(value=None), run_of("lwf", value=None)])
    one = compare_arms("digits", arms, arms[0], None, FEW)
    assert one.rows[0].metrics == {}
    assert math.isnan(one.rows[1].difference.mean)  # type: ignore[union-attr]
    assert isinstance(arms[0].runs[0], Run)


def test_runs_that_prune_are_no_pair_of_runs_that_do_not() -> None:
    pruning, never, before = run_of(prune="dead_experts"), run_of(prune="never"), run_of()
    context = context_of(["strategy"])
    assert pruning.pair(context) != never.pair(context)
    assert never.pair(context) == before.pair(context)  # of an earlier version
