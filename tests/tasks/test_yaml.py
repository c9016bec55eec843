"""A stream's YAML holds exactly its builder's parameters, with the builder's own defaults."""

from __future__ import annotations

import inspect
from importlib import import_module
from pathlib import Path

import pytest
from omegaconf import OmegaConf

FILES = sorted((Path(__file__).parents[2] / "conf" / "stream").glob("*.yaml"))
NAMES = ("split_digits", "permuted_digits", "text_domains", "split_texts")
MINE = [path for path in FILES if path.stem in NAMES]
SEEDS = {"seed": "${seed.order}", "data_seed": "${seed.data}"}


@pytest.mark.parametrize("path", MINE, ids=lambda path: path.stem)
def test_the_signature_is_the_schema(path: Path) -> None:
    keys = dict(OmegaConf.to_container(OmegaConf.load(path).stream, resolve=False))  # type: ignore[arg-type]
    module, name = str(keys.pop("_target_")).rsplit(".", 1)
    parameters = inspect.signature(getattr(import_module(module), name)).parameters
    assert name == path.stem
    assert list(keys) == list(parameters)
    for key, value in keys.items():
        default = parameters[str(key)].default
        assert value == SEEDS.get(str(key), list(default) if isinstance(default, tuple) else default), key


@pytest.mark.parametrize("path", MINE, ids=lambda path: path.stem)
def test_it_opens_with_how_to_run_it(path: Path) -> None:
    first, second, *_ = path.read_text().splitlines()
    assert first == "# @package _global_"
    assert second.startswith(f"# cl-moe stream={path.stem}")


@pytest.mark.parametrize("path", MINE, ids=lambda path: path.stem)
def test_it_builds_through_hydra(path: Path) -> None:
    from hydra.utils import instantiate

    config = OmegaConf.merge({"seed": {"order": 3, "data": 0}}, OmegaConf.load(path))
    stream = instantiate(config.stream)
    assert stream.name == path.stem
    names = [item.name for item in stream]
    config.seed.order = None
    config.stream.order = {
        "split_digits": [1, 0, *range(2, 10)],
        "permuted_digits": [4, 3, 2, 1, 0],
        "text_domains": ["python_code", "bible_en", "novels_en"],
        "split_texts": list(config.stream.get("domains", []))[::-1],
    }[path.stem]
    again = [item.name for item in instantiate(config.stream)]
    assert again != names
    assert len(again) == len(names)
