"""From a composed configuration to a run: checks, objects, names; then the experiment."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

import cl_moe
from cl_moe.checkpoint import write_atomically
from cl_moe.errors import InputError
from cl_moe.experiment import run_experiment
from cl_moe.learner import Learner
from cl_moe.run import Run
from cl_moe.schema import COMMAND, GROUPS, check_config
from cl_moe.seeds import seeded

# What never makes another arm: where and when it ran, which seeds, and the groups that are named anyway.
NOT_ARM = tuple(f"{group}=" for group in ("stream", "layer", "router", "growth", "freeze", "strategy"))
NOT_ARM += ("seed.", "tracking", "output_dir=", "resume=", "objective=", "keep_checkpoints=", "hydra")
NOT_ARM += ("arm=", "experiment=", "mlflow_experiment=", "stream.order=")


def run(config: DictConfig) -> float:
    """One experiment from a composed configuration; returns the objective."""
    return run_experiment(build(config))


def build(config: DictConfig) -> Run:
    """The run that a configuration describes; nothing is trained yet.

    Raises:
        InputError: a key, a value, or a combination of them cannot be.
    """
    check_config(config)
    folder = Path(config.output_dir).absolute()
    store_config(config, folder)
    stream = instantiate(config.stream)
    with seeded(config.seed.init, "init"):
        model = instantiate(config.model)(input_shape=stream.input_shape, num_classes=stream.num_classes)
    spec = instantiate(config.trainer)
    learner = Learner(
        model,
        optimizer=instantiate(config.optimizer),
        strategies={str(name): instantiate(node) for name, node in config.strategy.items()},
        stream=stream,
        seed=config.seed.data,
        log_every=spec.log_every * spec.accumulate,
    )
    labels = tags(config, stream.scenario, folder)
    arm = config.arm or arm_name(labels, list(HydraConfig.get().overrides.task))
    return Run(
        stream,
        learner,
        growth=instantiate(config.growth),
        freeze=instantiate(config.freeze),
        spec=spec,
        tracker=instantiate(config.tracking),
        folder=folder,
        seed_init=config.seed.init,
        seed_data=config.seed.data,
        objective=config.objective,
        keep_checkpoints=config.keep_checkpoints,
        name=f"{arm} {labels['seed.init']}.{labels['seed.order']}.{labels['seed.data']}",
        params={**flatten(config), "arm": arm},
        tags=labels,
    )


def store_config(config: DictConfig, folder: Path) -> None:
    """Write the resolved configuration into the run's folder; a resumed run must bring the same."""
    path = folder / "config.yaml"
    resolved = OmegaConf.to_container(config, resolve=True)
    assert isinstance(resolved, dict)
    resolved |= {"resume": None, "output_dir": str(folder)}
    if path.exists():
        stored = OmegaConf.to_container(OmegaConf.load(path))
        assert isinstance(stored, dict)
        old, new = dict(_leaves(stored)), dict(_leaves(resolved))
        changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
        changed = [key for key in changed if key != "output_dir"]
        if changed:
            key = changed[0]
            raise InputError(
                got=f"{key}={new.get(key)!r} in a run that began with {old.get(key)!r}",
                allowed="the configuration of the run that is resumed, or a new folder",
                key=key,
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    sources = HydraConfig.get().runtime.config_sources
    command = {
        "overrides": list(HydraConfig.get().overrides.task),
        "config_dir": next((source.path for source in sources if source.provider == "command-line"), None),
    }
    # Not Hydra's own record, which stands elsewhere if output_dir was given, and may be half written.
    write_atomically(folder / COMMAND, OmegaConf.to_yaml(OmegaConf.create(command)).encode())
    write_atomically(path, OmegaConf.to_yaml(OmegaConf.create(resolved)).encode())


def tags(config: DictConfig, scenario: str, folder: Path) -> dict[str, str]:
    """What a run is found by in MLflow."""
    choices = HydraConfig.get().runtime.choices
    commit, dirty = checkout()
    labels = {group: str(choices.get(group)) for group in GROUPS}
    labels["router"] = {"dense": "none", "peer": "product_key", "pkm": "product_key"}.get(
        labels["layer"], labels["router"]
    )
    multirun = HydraConfig.get().mode == RunMode.MULTIRUN
    return labels | {
        "scenario": scenario,
        "strategy": "+".join(str(name) for name in config.strategy),
        "seed.init": str(config.seed.init),
        "seed.order": _order(config),
        "seed.data": str(config.seed.data),
        "git_commit": commit,
        "git_dirty": dirty,
        "sweep": str(HydraConfig.get().sweep.dir) if multirun else "none",
        "world_size": "1",
        "output_dir": str(folder),
    }


def arm_name(labels: Mapping[str, str], overrides: list[str]) -> str:
    """A short readable name, the same over seeds and orders, another for another configuration.

    >>> labels = {"layer": "peer", "router": "", "growth": "at", "freeze": "never", "strategy": "lwf"}
    >>> arm_name(labels, ["layer=peer", "strategy=lwf", "seed.init=3", "strategy.lwf.alpha=2"])
    'peer at lwf strategy.lwf.alpha=2'
    """
    layer = f"moe {labels['router']}" if labels["layer"] == "moe" else labels["layer"]
    chosen = [labels[group] for group in ("growth", "freeze") if labels[group] != "never"]
    ignored = NOT_ARM if labels["layer"] == "moe" else (*NOT_ARM, "router.")
    others = sorted(o for o in overrides if not o.lstrip("+~").startswith(ignored))
    return " ".join([layer, *chosen, labels["strategy"], *others])


def flatten(config: DictConfig) -> dict[str, object]:
    """Resolved leaves under dotted keys; a node that stands in several places is listed where it belongs."""
    raw = OmegaConf.to_container(config, resolve=False)
    resolved = OmegaConf.to_container(config, resolve=True)
    assert isinstance(raw, dict)
    assert isinstance(resolved, dict)
    return dict(_leaves(_own(raw, resolved)))


def checkout() -> tuple[str, str]:
    """Commit of the program's checkout and whether it was changed since; ``unknown`` outside one."""
    home = Path(cl_moe.__file__).resolve().parents[1]

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(home), *words], capture_output=True, text=True, check=True, timeout=10
        )
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != home:
            return "unknown", "unknown"
        return git("rev-parse", "HEAD"), str(bool(git("status", "--porcelain"))).lower()
    except (OSError, subprocess.SubprocessError):
        return "unknown", "unknown"


def _order(config: DictConfig) -> str:
    """The order of the experiences: a list, a seed, or the stream's natural one."""
    listed = config.stream.get("order")
    if listed is not None:
        return " ".join(str(item) for item in listed) if OmegaConf.is_list(listed) else str(listed)
    return "natural" if config.seed.order is None else str(config.seed.order)


def _own(raw: Any, resolved: Any) -> Any:
    """The resolved tree without nodes that are references to other nodes."""
    if not isinstance(raw, dict):
        return resolved
    kept = {}
    for key, value in raw.items():
        if not (isinstance(value, str) and isinstance(resolved[key], dict)):
            kept[key] = _own(value, resolved[key])
    return kept


def _leaves(tree: Mapping[Any, Any], place: str = "") -> Iterator[tuple[str, object]]:
    for key, value in tree.items():
        name = f"{place}.{key}" if place else str(key)
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, name)
        else:
            yield name, value
