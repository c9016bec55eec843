"""The signature is the schema (law 8): a composed configuration held against the constructors it names."""

from __future__ import annotations

import inspect
import math
import types
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from hydra.utils import get_object
from omegaconf import DictConfig, ListConfig, OmegaConf

from cl_moe.errors import InputError

GROUPS = (
    "stream",
    "model",
    "layer",
    "router",
    "growth",
    "freeze",
    "prune",
    "optimizer",
    "trainer",
    "tracking",
)
TOP = {
    "arm",
    "objective",
    "mlflow_experiment",
    "output_dir",
    "resume",
    "auto_resume",
    "branch",
    "distill",
    "reproduce",
    "describe",
    "upcycle",
    "upcycle_noise",
    "seed",
    "strategy",
}
NODES = ("checkpoint", "eval", "budget")  # options without alternatives, so not groups
SEEDS = ("init", "order", "data")
GIVEN = ("dim", "input_shape", "num_classes")
"""Parameters that the program gives to a factory, never the user."""


def check_config(config: DictConfig) -> None:
    """Refuse keys that nothing reads, and values of another kind than their parameter's.

    Raises:
        InputError: what was given, what the constructor or the top level takes, and the key.
    """
    for key in map(str, config):
        if key not in (*TOP, *GROUPS, *NODES):
            _refuse(f"{key}, which nothing reads", ", ".join(sorted({*TOP, *GROUPS, *NODES})), key)
    if not isinstance(config.get("strategy"), DictConfig) or not config.strategy:
        _refuse(f"strategy={config.get('strategy') or []}", "a strategy, or naive for none", "strategy")
    _check_seeds(config.get("seed"))
    if not isinstance(config.output_dir, str) or not config.output_dir.strip():
        _refuse(f"output_dir={config.output_dir!r}", "a folder", "output_dir")
    if not isinstance(config.auto_resume, bool):
        _refuse(f"auto_resume={config.auto_resume!r}", "true or false", "auto_resume")
    if not isinstance(config.describe, bool):
        _refuse(f"describe={config.describe!r}", "true or false", "describe")
    if config.branch is not None and not isinstance(config.branch, str):
        _refuse(f"branch={config.branch!r}", "<run id or run folder>@<experience>, or null", "branch")
    if config.distill is not None and not isinstance(config.distill, str):
        _refuse(f"distill={config.distill!r}", "<run id or run folder>[@<experience>], or null", "distill")
    _check_upcycling(config)
    if config.arm is not None and not (isinstance(config.arm, str) and config.arm.strip()):
        _refuse(f"arm={config.arm!r}", "a name, or null", "arm")
    raw: Any = OmegaConf.to_container(config, resolve=False)
    resolved: Any = OmegaConf.to_container(config, resolve=True)
    groups = {
        **{name: raw[name] for name in (*GROUPS, *NODES)},
        **{f"strategy.{k}": v for k, v in raw["strategy"].items()},
    }
    for place, node in groups.items():
        if not isinstance(node, dict) or "_target_" not in node:
            _refuse(f"{place}={node!r}", "one of the group's options, with its keys", place)
        _check_node(place, node, _at(resolved, place))


def _check_upcycling(config: DictConfig) -> None:
    noise = config.upcycle_noise
    if not isinstance(config.upcycle, bool):
        _refuse(f"upcycle={config.upcycle!r}", "true or false", "upcycle")
    if not fits(noise, float) or noise < 0:
        _refuse(f"upcycle_noise={noise!r}", "a number >= 0", "upcycle_noise")
    if config.upcycle and config.branch is None:
        allowed = "branch=<dense run>@<experience> beside it: a dense run that goes on as a mixture"
        _refuse("upcycle=true without a branch", allowed, "branch (or upcycle)")
    if noise and not config.upcycle:
        _refuse(
            f"upcycle_noise={noise} without copies", "upcycle=true beside it", "upcycle_noise (or upcycle)"
        )


def _check_seeds(seeds: Any) -> None:
    if not isinstance(seeds, DictConfig):
        _refuse(f"seed={seeds!r}", ", ".join(f"seed.{name}" for name in SEEDS), "seed")
    for name, seed in seeds.items():
        if name not in SEEDS:
            _refuse(f"seed.{name}", ", ".join(f"seed.{known}" for known in SEEDS), f"seed.{name}")
        if isinstance(seed, bool) or not (isinstance(seed, int) or (name == "order" and seed is None)):
            allowed = "a whole number" + (", or null for the natural order" if name == "order" else "")
            _refuse(f"seed.{name}={seed!r}", allowed, f"seed.{name}")


def _check_node(place: str, node: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    target = get_object(node["_target_"])
    parameters = inspect.signature(target).parameters
    hints = get_type_hints(target if inspect.isfunction(target) else target.__init__)
    takes = [name for name in parameters if not (node.get("_partial_") and name in GIVEN)]
    for key in node:
        if key in ("_target_", "_partial_"):
            continue
        if key not in takes:
            got = f"{place}.{key}, which {node['_target_']} does not take"
            _refuse(got, ", ".join(takes), f"{place}.{key}")
        kinds = list(_kinds(hints.get(key, Any)))
        if not any(fits(values[key], kind) for kind in kinds):
            allowed = " or ".join(dict.fromkeys(_name(kind) for kind in kinds))
            _refuse(f"{place}.{key}={values[key]!r}", allowed, f"{place}.{key}")


def _kinds(hint: Any) -> Iterator[Any]:
    """The alternatives of an annotation."""
    if get_origin(hint) in (Union, types.UnionType):
        for part in get_args(hint):
            yield from _kinds(part)
    else:
        yield hint


def fits(value: Any, kind: Any) -> bool:
    """Whether a configuration's value is of an annotated kind; what YAML cannot express is not judged.

    >>> fits(3, int), fits(True, int), fits(3, float), fits(float("nan"), float), fits("x", Literal["x", "y"])
    (True, False, True, False, True)
    """
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if kind in (bool, str):
        return isinstance(value, kind)
    if kind in (None, type(None)):
        return value is None
    return value is not None and not (isinstance(value, bool | int | float | str) and _is_collection(kind))


def _is_collection(kind: Any) -> bool:
    origin = get_origin(kind)
    return inspect.isclass(origin) and issubclass(origin, Mapping | list | tuple | set | _sequence())


def _sequence() -> type:
    from collections.abc import Sequence

    return Sequence


def _name(kind: Any) -> str:
    names = {int: "a whole number", float: "a finite number", bool: "true or false", str: "a word"}
    if kind in (None, type(None)):
        return "null"
    if get_origin(kind) is Literal:
        return ", ".join(str(word) for word in get_args(kind))
    if _is_collection(kind):
        return "{key: value, ...}" if issubclass(get_origin(kind), Mapping) else "[a, list]"
    return names.get(kind, "an option with its keys")


def plain(config: DictConfig | ListConfig, resolve: bool = True) -> dict[Any, Any]:
    """A configuration as plain dicts and lists, its interpolations resolved or left as written."""
    tree = OmegaConf.to_container(config, resolve=resolve)
    assert isinstance(tree, dict)
    return tree


def leaves(tree: Mapping[Any, Any], place: str = "") -> Iterator[tuple[str, object]]:
    """Values of a nested mapping under dotted keys; an empty mapping is a value."""
    for key, value in tree.items():
        name = f"{place}.{key}" if place else str(key)
        if isinstance(value, Mapping) and value:
            yield from leaves(value, name)
        else:
            yield name, value


def _at(tree: Any, place: str) -> Any:
    for name in place.split("."):
        tree = tree[name]
    return tree


def _refuse(got: str, allowed: str, key: str) -> None:
    raise InputError(got=got, allowed=allowed, key=key)
