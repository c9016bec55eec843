"""``make results``: what an experiment claims, whether its runs bear that out, and where it is written."""

from __future__ import annotations

import dataclasses
import fnmatch
import importlib.util
import inspect
import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from hydra.utils import get_object

from cl_moe import launch
from cl_moe.errors import InputError
from cl_moe.stream import Stream, take
from cl_moe.tracking.compare.arms import Arm
from cl_moe.tracking.compare.claims import judge, read_claim
from cl_moe.tracking.compare.runs import Run

ROOT = Path(__file__).parents[1]
OPENING = """# @package _global_
# Question: is it so?
# Source:   somebody,
#   somewhere
# Command:  cl-moe -m experiment=x seed.init=0,1 'seed.data=${seed.init}' && cl-moe experiment=x
# Run time: a minute
# Full scale: stream=hf
"""


def load() -> ModuleType:
    """The program beside the benchmarks."""
    spec = importlib.util.spec_from_file_location("results", ROOT / "benchmarks" / "results.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


results = load()
NAMED = {
    one.name: one
    for one in map(results.read, sorted((ROOT / "conf" / "experiment").glob("*.yaml")))
    if one is not None
}


def read(tmp_path: Path, *lines: str) -> Any:
    path = tmp_path / "x.yaml"
    path.write_text(OPENING + "".join(f"# {line}\n" for line in lines) + "arm: x\n# Claim: late x above 1\n")
    return results.read(path)


def arm(name: str, **metrics: list[float]) -> Arm:
    """Runs with seeds 0, 1, ... that have these values of ``stream/...``."""
    runs = []
    for seed, values in enumerate(zip(*metrics.values(), strict=True)):
        about = {"arm": name, "seed.init": str(seed), "seed.order": "natural", "seed.data": "0"}
        found = {f"stream/{key}": value for key, value in zip(metrics, values, strict=True)}
        runs.append(Run(f"{name}{seed}", 0, about, found))
    return Arm(name, runs)


ARMS = [
    arm("naive", loss=[3.0, 3.1, 2.9, 3.2], worst=[4.0, 4.2, 4.1, 4.0]),
    arm("lwf", loss=[2.0, 2.2, 1.9, 2.0], worst=[2.5, 2.8, 2.3, 2.6]),
]


def verdict(text: str, arms: list[Arm] = ARMS) -> str:
    return judge(read_claim(text, "x.yaml"), arms).word


@pytest.mark.parametrize(("text", "word"), [
    ("lwf stream/loss below naive", "reproduced"),
    ("naive stream/loss above lwf", "reproduced"),
    ("naive stream/loss below lwf", "contradicted"),
    ("lwf stream/loss below naive by 0.2", "reproduced"),
    ("lwf stream/loss below naive by 1", "not at this scale"),
    ("lwf stream/loss below naive by 2", "contradicted"),
    ("naive stream/worst above naive stream/loss", "reproduced"),
    ("naive stream/loss above 3", "not at this scale"),
    ("naive stream/loss above 2.5", "reproduced"),
    ("naive stream/loss above -2 by 9", "contradicted"),
])  # fmt: skip
def test_a_claim_is_held_against_the_interval(text: str, word: str):
    assert verdict(text) == word


def test_one_pair_bears_out_nothing():
    assert verdict("a stream/loss below b", [arm("a", loss=[1]), arm("b", loss=[2])]).endswith("one pair")


@pytest.mark.parametrize(
    "text", ["x stream/loss below lwf", "lwf stream/x below naive", "lwf stream/loss below x"]
)
def test_a_claim_about_what_there_is_not(text: str):
    with pytest.raises(InputError, match="the arms naive, lwf"):
        verdict(text)


def test_an_experiments_opening(tmp_path: Path):
    named = read(tmp_path, "Claim:    a stream/x below b", "Claim: a stream/x above 2 by .5")
    assert named.about["Source"] == "somebody, somewhere"
    assert [(c.against, c.other, c.margin) for c in named.claims] == [
        ("b", "stream/x", 0),
        ("2", "stream/x", 0.5),
    ]
    sweep, single = results.commands(named, tmp_path)
    assert sweep[:4] == ["-m", "experiment=x", "seed.init=0,1", "seed.data=${seed.init}"]
    assert f"hydra.sweep.dir={tmp_path}/x/0" in sweep
    assert f"hydra.run.dir={tmp_path}/x/1" in single
    assert {"auto_resume=true", "mlflow_experiment=x"} <= {*sweep} & {*single}
    sweep, single = results.commands(named, tmp_path, jobs=2)
    assert {"hydra/launcher=workstation", "hydra.launcher.n_jobs=2"} <= {*sweep}
    assert not any(word.startswith("hydra/launcher") for word in single)
    assert read(tmp_path) is None, "an experiment that claims nothing"


@pytest.mark.parametrize(("line", "got"), [
    ("Claim: a below b", "Claim: a below b"),
    ("Claim: a stream/x near b", "Claim: a stream/x near b"),
    ("Claim: a stream/x below b\n# Figure: none", "Figure: none"),
])  # fmt: skip
def test_an_opening_that_cannot_be_read(tmp_path: Path, line: str, got: str):
    with pytest.raises(InputError, match=got):
        read(tmp_path, line)


def test_what_stands_outside_the_marks_stays():
    page = results.put(results.put("# Results\nby hand\n", "a", "one"), "b", "two")
    mine = page.replace("## b\n", "between\n## b\n") + "at the end\n"
    again = results.put(mine, "a", "three")
    assert again == mine.replace("one", "three")
    with pytest.raises(InputError, match="without an end"):
        results.put(mine.replace("<!-- end of results: a -->\n", ""), "a", "four")


def test_names_that_are_no_experiments():
    with pytest.raises(InputError, match="got: nothing"):
        results.main("nothing")


@pytest.mark.parametrize("name", sorted(NAMED))
def test_a_named_experiments_commands_are_its_own(name: str, tmp_path: Path):
    for words in results.commands(NAMED[name], tmp_path):
        assert f"experiment={name}" in words


def first_of(word: str) -> str:
    """An override, with the first value of a sweep."""
    key, _, value = word.partition("=")
    return word if value.startswith(("[", "{")) or "=" not in word else f"{key}={value.split(',')[0]}"


UNLIKE = {
    "lifelong_growth",
    "peer_batchnorm",
    "stability_gap",
    "switch_dropout",
}  # others resemble one of them


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in UNLIKE else pytest.mark.slow) for name in sorted(NAMED)]
)
def test_the_sources_own_size_is_an_override(name: str, composed: Callable):
    """What stands before the first comma that ends a word; the rest is said in words."""
    words = shlex.split(re.split(r",(?= )", NAMED[name].about["Full scale"])[0])
    stream = composed(f"experiment={name}", *map(first_of, words)).stream
    assert {*stream} - {"_target_"} <= {*inspect.signature(get_object(stream._target_)).parameters}


NEEDS_DATA = pytest.mark.skipif(not os.environ.get("CL_MOE_DATA"), reason="its data are in CL_MOE_DATA")
HERE = [
    pytest.param(name, marks=NEEDS_DATA) if name == "finetune_intents" else name for name in sorted(NAMED)
]


@pytest.mark.slow
@pytest.mark.parametrize("name", HERE)
def test_every_arm_that_a_claim_names_builds(
    name: str, command_in: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Every command of the file with one seed, as far as to the first step; and what is made of its arms."""
    arms: set[str] = set()
    monkeypatch.setattr(launch, "run_experiment", lambda run: arms.add(run.params["arm"]) or 0.0)
    monkeypatch.setattr(launch, "run_in_ranks", lambda config, *_: arms.add(config.arm) or 0.0)
    monkeypatch.setattr(launch.stored, "note_finished", lambda *_: None)
    for words in results.commands(NAMED[name], tmp_path):
        # Nothing ran, so there is no teacher either.
        kept = [word for word in words if not re.match(r"tracking\.|distill=|.*distill_from", word)]
        one = [word.split(",")[0] if word.startswith("seed.") else word for word in kept]
        done = command_in(tmp_path, *one, "tracking=none")
        assert done.status == 0, f"{shlex.join(one)}\n{done.text}"
    for derived in NAMED[name].derived:
        patterns = {
            word for key in ("arms", "base", "high") for word in derived.words.get(key, "").split(",")
        }
        assert all(fnmatch.filter(arms, pattern) for pattern in patterns - {""}), f"{derived.text}: {arms}"
        arms.add(derived.name)
    for claim in NAMED[name].claims:
        assert claim.arm in arms
        assert claim.against in arms or claim.against.replace(".", "").isdigit()


def few(stream: object) -> object:
    """Of every experience a few examples."""
    if not isinstance(stream, Stream):
        return stream

    def thin(data: Any, num: int) -> Any:
        return take(data, torch.arange(0, len(data), max(1, len(data) // num)))

    experiences = [
        dataclasses.replace(experience, train=thin(experience.train, 40), test=thin(experience.test, 12))
        for experience in stream
    ]
    return dataclasses.replace(stream, experiences=tuple(experiences))


@pytest.mark.slow
@pytest.mark.parametrize("name", HERE)
def test_an_experiment_cut_to_a_few_steps_gets_its_verdict(
    name: str, command_in: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Every arm with one seed, through the commands of its file to the page."""
    file = ROOT / "conf" / "experiment" / f"{name}.yaml"
    inside = ["eval.every=1"] if "  every: " in file.read_text() else []
    instantiate = launch.instantiate
    monkeypatch.setattr(launch, "instantiate", lambda *words, **more: few(instantiate(*words, **more)))

    def run(command: list[str], check: bool) -> SimpleNamespace:
        words = [word.split(",")[0] if word.startswith("seed.") else word for word in command[3:]]
        if any(word.startswith("distill=") and not word.endswith("/0") for word in words):
            return SimpleNamespace(returncode=0)  # the student of a seed that was left out
        done = command_in(tmp_path, *words, "trainer.epochs=1", *inside)
        assert done.status == 0, f"{shlex.join(words)}\n{done.text}"
        return SimpleNamespace(returncode=done.status)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(results, "subprocess", SimpleNamespace(run=run))
    monkeypatch.setattr(results, "_page", lambda: tmp_path / "docs" / "RESULTS.md")
    assert results.main(name) == 0
    page = (tmp_path / "docs" / "RESULTS.md").read_text()
    assert all(f"one pair: {claim.text}" in page for claim in NAMED[name].claims)
    assert (tmp_path / "docs" / "images" / f"results_{name}.png").is_file()
