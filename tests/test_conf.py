"""Every YAML of every group composes, instantiates, and its keys are its class's parameters (law 8)."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf

import conf
from cl_moe import launch

Compose = Callable[..., DictConfig]
ROOT = Path(conf.__path__[0])
GIVEN_LATER = {  # parameters that the program gives, not the user
    "layer": {"dim"},
    "router": {"dim"},
    "model": {"input_shape", "num_classes"},
}
ELSEWHERE = {"intents": "clinc150.parquet", "split_fashion_mnist": "fashion_mnist_10k.npz"}
LEAVES = sorted(
    (path.parent.name, path.stem) for path in ROOT.glob("*/*.yaml") if path.parent.name != "experiment"
)
EXPERIMENTS = sorted(
    str(path.relative_to(ROOT / "experiment").with_suffix("")) for path in ROOT.glob("experiment/**/*.yaml")
)


def node_of(config: DictConfig, group: str, name: str) -> DictConfig:
    return config.strategy[name] if group == "strategy" else config[group]


def test_the_groups_of_the_contract_are_there():
    groups = {group for group, _ in LEAVES}
    assert groups == {"strategy", *launch.GROUPS}


ARRIVED = {"arriving": [f"stream.files={ROOT.parent}/tasks/data/brown_press.parquet"]}


@pytest.mark.parametrize(("group", "name"), LEAVES, ids="/".join)
def test_keys_are_the_parameters_of_the_class(group: str, name: str, composed: Compose):
    node = node_of(composed(f"{group}={name}"), group, name)
    parameters = inspect.signature(get_object(node._target_)).parameters
    keys = {key for key in node if key not in ("_target_", "_partial_")}
    assert keys == set(parameters) - GIVEN_LATER.get(group, set())


@pytest.mark.parametrize(("group", "name"), LEAVES, ids="/".join)
def test_every_leaf_instantiates(group: str, name: str, composed: Compose):
    if name in ELSEWHERE and not os.environ.get("CL_MOE_DATA"):
        pytest.skip(f"stream={name} needs {ELSEWHERE[name]} in CL_MOE_DATA")
    made = instantiate(node_of(composed(f"{group}={name}", *ARRIVED.get(name, [])), group, name))
    assert isinstance(made, functools.partial) == (group in GIVEN_LATER)


@pytest.mark.parametrize(("group", "name"), LEAVES, ids="/".join)
def test_a_leaf_opens_with_how_to_run_it(group: str, name: str):
    text = (ROOT / group / f"{name}.yaml").read_text()
    opening = next(line for line in text.splitlines() if not line.startswith("# @package"))
    assert opening.startswith("# cl-moe")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_builds(name: str, composed: Compose, tmp_path: Path):
    config = composed(f"experiment={name}", "tracking=none")
    if HydraConfig.get().runtime.choices.stream in ELSEWHERE and not os.environ.get("CL_MOE_DATA"):
        pytest.skip("its data are in CL_MOE_DATA")
    config.output_dir = str(tmp_path)
    run = launch.build(config)
    assert run.params["arm"]
    text = (ROOT / "experiment" / f"{name}.yaml").read_text()
    assert "# Command:" in text


def test_strategies_stand_side_by_side(composed: Compose):
    strategy = composed("strategy=[replay,lwf]").strategy
    assert set(strategy) == {"replay", "lwf"}
    assert set(strategy.replay) == {"_target_", "memory_size", "share", "policy", "balance"}
    assert set(strategy.lwf) == {"_target_", "alpha", "temperature"}


def test_an_own_value_survives_beside_a_second_strategy(composed: Compose):
    strategy = composed("strategy=[replay,lwf]", "strategy.replay.memory_size=7").strategy
    assert (strategy.replay.memory_size, "memory_size" in strategy.lwf) == (7, False)


def test_a_stream_brings_its_model_and_the_command_line_wins(composed: Compose):
    assert composed("stream=text_domains").model._target_.endswith("DecoderLM")
    assert composed("stream=text_domains", "model=mlp").model._target_.endswith("MLPClassifier")
    assert composed("stream=split_digits", "trainer.epochs=3").trainer.epochs == 3


def test_top_level_keys_of_the_contract(composed: Compose):
    config = composed()
    for key in ("seed.init", "seed.order", "seed.data", "resume", "objective", "output_dir", "arm"):
        assert OmegaConf.select(config, key, throw_on_missing=True) is not None or key in (
            "seed.order",
            "resume",
            "arm",
        )
    for key in ("trainer.epochs", "trainer.batch_size", "trainer.devices", "trainer.precision"):
        assert OmegaConf.select(config, key) is not None


def test_flattened_params_list_a_shared_node_once(composed: Compose):
    params = launch.flatten(composed("layer=moe"))
    assert params["layer.num_experts"] == 8
    assert params["router.k"] == 2
    assert not any(key.startswith(("model.layer", "layer.router")) for key in params)


def test_seeds_and_streams_make_no_other_arm():
    labels = {"layer": "moe", "router": "top_k", "growth": "at", "freeze": "never", "strategy": "lwf"}
    plain = launch.arm_name(labels, ["layer=moe"])
    assert launch.arm_name(labels, ["seed.init=3", "seed.order=1", "stream=text_domains"]) == plain
    assert launch.arm_name(labels, ["strategy.lwf.alpha=3"]) != plain
