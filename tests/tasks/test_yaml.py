"""A stream's YAML holds exactly its builder's parameters; one that is the builder's own, its defaults too."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from cl_moe.stream import Stream

FILES = sorted((Path(__file__).parents[2] / "conf" / "stream").glob("*.yaml"))
NAMES = [path.stem for path in FILES]
SEEDS = {"seed": "${seed.order}", "data_seed": "${seed.data}"}
CONTRACT = "split_digits permuted_digits split_mnist permuted_mnist rotated_mnist split_fashion_mnist"
CONTRACT += " text_domains text_languages intents hf"
LARGE = ("permuted_mnist", "rotated_mnist", "corrupted_mnist", "split_fashion_mnist")
"""Whole sets several times over; others like them are tested in every run."""
BY_NAME = ("arriving",)  # in the order of its files' names, whatever the seed
Compose = Callable[..., DictConfig]


def test_the_streams_of_the_contract_are_there() -> None:
    assert set(CONTRACT.split()) <= set(NAMES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_signature_is_the_schema(path: Path) -> None:
    node = OmegaConf.load(path).stream
    keys: dict[str, Any] = dict(OmegaConf.to_container(node, resolve=False))  # type: ignore[arg-type]
    if "_target_" not in keys:
        return  # it changes another one
    target = str(keys.pop("_target_"))
    parameters = inspect.signature(get_object(target)).parameters
    assert list(keys) == list(parameters)
    own = target.rpartition(".")[2] == path.stem
    for key, value in keys.items():
        default = parameters[key].default
        if key in SEEDS or (own and default is not inspect.Parameter.empty):
            assert value == SEEDS.get(key, list(default) if isinstance(default, tuple) else default), key


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_opens_with_how_to_run_it(path: Path) -> None:
    first, second, *_ = path.read_text().splitlines()
    assert first == "# @package _global_"
    assert second.startswith(f"# cl-moe stream={path.stem}")


@pytest.mark.parametrize("name", [name for name in NAMES if name not in BY_NAME])
def test_seeds_and_lists_order_it_and_the_same_seeds_give_the_same_tensors(
    name: str, build: Callable[..., Stream], composed: Compose
) -> None:
    natural = build(name)
    drawn = [build(name, f"seed.order={seed}") for seed in range(4)]
    assert len({tuple(e.name for e in stream) for stream in drawn}) > 1
    assert {len(stream) for stream in drawn} == {len(natural)}
    for one, two in zip(drawn[1], build(name, "seed.order=1"), strict=True):
        assert one.name == two.name
        pairs = zip(
            (*one.train.tensors, *one.test.tensors), (*two.train.tensors, *two.test.tensors), strict=True
        )
        assert all(a.equal(b) for a, b in pairs)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in LARGE else name for name in NAMES]
)
def test_whatever_its_order_and_cut_its_examples_are_the_same(
    name: str, build: Callable[..., Stream], rows: Any
) -> None:
    plain, other = build(name), build(name, "seed.order=1", "stream.cut=2", "seed.data=0")
    assert plain.open == (name in BY_NAME)
    by_way = name.endswith("_mnist") and not name.startswith("split")
    if name in ("split_digits", "split_mnist", "split_fashion_mnist") or by_way or plain.kind == "language":
        assert rows(e.train for e in plain) == rows(e.train for e in other)
        tests = list({id(e.test): e.test for e in other}.values())
        assert rows(tests) == rows(e.test for e in plain)
    assert sum(len(e.train) for e in plain) == sum(len(e.train) for e in other)


@pytest.mark.parametrize("name", NAMES)
def test_it_needs_no_network(name: str, build: Callable[..., Stream], no_network: None) -> None:
    stream = build(name)
    assert stream.scenario in ("class", "task", "domain")


@pytest.mark.parametrize("name", NAMES)
def test_no_example_is_lost_doubled_or_leaked(name: str, build: Callable[..., Stream], rows: Any) -> None:
    plain, parts = build(name), build(name, "stream.cut=3")
    assert rows(e.train for e in plain) == rows(e.train for e in parts)
    if name == "peers_digits":
        return  # its data are the peers', to the letter
    held = build(name, "stream.shape={validation:.2}")
    tests = list({id(e.test): e.test for e in held}.values())
    assert rows([*(e.train for e in held), *tests]) == rows(e.train for e in plain), "one side or the other"
    for experience in held:
        share = len(experience.test) / (len(experience.train) + len(experience.test))
        assert 0.1 < share < 0.3
