"""From a composed configuration to a run: checks, objects, names; then the experiment."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from cl_moe import (
    agreement,
    branching,
    checkpoint,
    describing,
    distilling,
    failures,
    reproducing,
    stopping,
    stored,
)
from cl_moe.checkpoint import Branch
from cl_moe.errors import StopRequestedError
from cl_moe.experiment import run_experiment
from cl_moe.learner import Learner
from cl_moe.models import ContinualModel
from cl_moe.ranks import run_in_ranks
from cl_moe.run import Run
from cl_moe.schema import GROUPS, check_config, leaves, plain
from cl_moe.seeds import seeded
from cl_moe.stream import Stream
from cl_moe.targets import check_targets
from cl_moe.tracking.names import DEFINITIONS
from cl_moe.tracking.provenance import checkout, data_checksum
from cl_moe.tracking.tracker import NoTracker
from cl_moe.trainer import TrainerSpec
from cl_moe.upcycling import Upcycled
from cl_moe.words import key_of

# What never makes another arm: where and when it ran, which seeds, and the groups that are named anyway.
NOT_ARM = tuple(
    f"{group}=" for group in ("stream", "layer", "router", "growth", "freeze", "prune", "strategy")
)
NOT_ARM += ("seed.", "tracking", "output_dir=", "resume=", "objective=", "checkpoint.", "eval.", "hydra")
NOT_ARM += ("arm=", "experiment=", "mlflow_experiment=", "stream.order=")
NOT_ARM += ("auto_resume=", "branch=", "distill=", "reproduce=", "describe=")


def run(config: DictConfig, changed: list[str] | None = None) -> float:
    """One experiment from a composed configuration; returns the objective.

    Args:
        config: composed.
        changed: for a rank: the overrides that tell its arm from the default, as the parent found them.
    """
    _obey()
    try:
        if config.get("describe") is not False:
            return describing.describe(config)
        if (value := stored.finished(config)) is not None:
            return value
        if agreement.num_ranks() == 1 and (spec := _trainer(config)).num_ranks > 1:
            return run_in_ranks(config, spec, _changed(config))
        original = reproducing.original_of(config) if agreement.is_first() else None
        run = build(config, original, changed)
        with reproducing.held_against(original, config, run):
            value = run_experiment(run)
            if agreement.is_first():
                stored.note_finished(config, run.folder, value, run.stream.open)
        return value
    except Exception as error:  # while the run is built: a run that is open names its failures itself
        if failure := failures.named(error, dict(leaves(plain(config, resolve=False)))):
            raise failure from error
        raise


def build(
    config: DictConfig, original: reproducing.Original | None = None, changed: list[str] | None = None
) -> Run:
    """The run that a configuration describes; nothing is trained yet.

    Args:
        config: composed.
        original: the run that it makes again.
        changed: as in ``run``.

    Raises:
        InputError: a key, a value, or a combination of them cannot be.
    """
    check_targets(config)
    check_config(config)
    stored.check_command_line(config)
    folder = stored.folder_of(config)
    stored.compare_config(config, folder)
    branch = branching.parent_of(config, folder)
    stream = instantiate(config.stream)
    with seeded(config.seed.init, "init"):
        model = instantiate(config.model)(input_shape=stream.input_shape, num_classes=stream.num_classes)
    strategies = {str(name): instantiate(node) for name, node in config.strategy.items()}
    teacher = distilling.teacher_of(config)
    distilling.attach(teacher, stream, model, list(strategies.values()))
    spec = instantiate(config.trainer)
    learner = Learner(
        model,
        optimizer=instantiate(config.optimizer),
        strategies=strategies,
        stream=stream,
        seed=config.seed.data,
        log_every=spec.log_every * spec.accumulate,
    )
    upcycled = upcycled_from(branch, config, stream, model) if config.upcycle else None
    labels = tags(config, stream, folder)
    arm = arm_of(config, labels, branch, changed)
    run = Run(
        stream,
        learner,
        growth=instantiate(config.growth),
        freeze=instantiate(config.freeze),
        prune=instantiate(config.prune),
        spec=spec,
        tracker=instantiate(config.tracking) if agreement.is_first() else NoTracker(),
        folder=folder,
        seed_init=config.seed.init,
        seed_data=config.seed.data,
        objective=config.objective,
        checkpoints=instantiate(config.checkpoint),
        measuring=instantiate(config.eval),
        budget=instantiate(config.budget),
        branch=branch,
        upcycled=upcycled,
        go_on=_sweep(),
        name=f"{arm} {labels['seed.init']}.{labels['seed.order']}.{labels['seed.data']}",
        params={**flatten(config), "arm": arm},
        tags=labels
        | (branching.tags(branch, config) if branch else {})
        | (distilling.tags(teacher, config) if teacher else {})
        | reproducing.tags(original),
    )
    run.tags = {**run.tags, "data_checksum": data_checksum(run.fingerprint)}
    run.measuring.matrix = branching.cumulative_matrix(config, run.fingerprint["stream"])
    if agreement.is_first():
        stored.store_config(config, folder)  # last: what was refused leaves nothing behind
    return run


def upcycled_from(
    branch: Branch | None, config: DictConfig, stream: Stream, model: ContinualModel
) -> Upcycled | None:
    """What a mixture takes over from its dense parent; None for a child that goes on from its own checkpoint.

    Raises:
        InputError: it cannot take it over.
    """
    if branch is None or checkpoint.boundaries(stored.folder_of(config)):
        return None
    dense, ledger = distilling.load_model(branch, stream, "branch")
    return Upcycled.of(model, dense, ledger, branch.boundary, config.upcycle_noise, config.seed.init)


def tags(config: DictConfig, stream: Stream, folder: Path) -> dict[str, str]:
    """What a run is found by in MLflow."""
    choices = HydraConfig.get().runtime.choices
    commit, dirty = checkout()
    labels = {group: str(choices.get(group)) for group in GROUPS}
    labels["router"] = {"dense": "none", "peer": "product_key", "pkm": "product_key"}.get(
        labels["layer"], labels["router"]
    )
    return labels | {
        "kind": stream.kind,
        "scenario": stream.scenario,
        "strategy": "+".join(str(name) for name in config.strategy),
        "seed.init": str(config.seed.init),
        "seed.order": _order(config),
        "seed.data": str(config.seed.data),
        "definitions": DEFINITIONS,
        "git_commit": commit,
        "git_dirty": dirty,
        "sweep": str(HydraConfig.get().sweep.dir) if _sweep() else "none",
        "world_size": str(agreement.num_ranks()),
        "output_dir": str(folder),
    }


def arm_of(
    config: DictConfig, labels: Mapping[str, str], branch: Branch | None, changed: list[str] | None = None
) -> str:
    """The arm's name: the one given, or one made of the configuration; a branch ends with its boundaries."""
    overrides = list(HydraConfig.get().overrides.task)
    made = arm_name(labels, _changed(config) if changed is None else changed)
    if branch is None:
        return config.arm or made
    # A name from a file is the parent's too, so what tells the children apart stands beside it.
    given = any(word.startswith("arm=") for word in overrides)
    words = [config.arm] if given else [config.arm, made] if config.arm else [made]
    return " ".join([*words, branching.history(branch)])


def arm_name(labels: Mapping[str, str], overrides: list[str]) -> str:
    """A short readable name, the same over seeds and orders, another for another configuration.

    >>> labels = {"layer": "peer", "router": "", "growth": "at", "freeze": "never", "strategy": "lwf"}
    >>> arm_name(labels, ["layer=peer", "strategy=lwf", "seed.init=3", "strategy.lwf.alpha=2"])
    'peer at lwf strategy.lwf.alpha=2'
    """
    layer = f"moe {labels['router']}" if labels["layer"] == "moe" else labels["layer"]
    chosen = [
        labels[group] for group in ("growth", "freeze", "prune") if labels.get(group, "never") != "never"
    ]
    ignored = NOT_ARM if labels["layer"] == "moe" else (*NOT_ARM, "router.")
    others = sorted(o for o in overrides if not o.lstrip("+~").startswith(ignored))
    return " ".join([layer, *chosen, labels["strategy"], *others])


def _trainer(config: DictConfig) -> TrainerSpec:
    check_targets(config)
    check_config(config)
    return instantiate(config.trainer)


def _changed(config: DictConfig) -> list[str]:
    """The overrides that change something: one that repeats a default makes no other arm.

    Asked of what Hydra composes without them; where it is not at hand (in another launcher's process, say)
    all of them count.
    """
    overrides = list(HydraConfig.get().overrides.task)
    others = [word for word in overrides if not word.lstrip("+~").startswith(NOT_ARM)]
    if not others or not GlobalHydra.instance().is_initialized():
        return overrides
    chosen, name = HydraConfig.get().runtime.choices, HydraConfig.get().job.config_name
    groups = [word for word in others if key_of(word) in chosen]
    rest = [word for word in overrides if word not in others]
    base = compose(name, rest, return_hydra_config=True)
    picked = [word for word in groups if chosen[key_of(word)] != base.hydra.runtime.choices.get(key_of(word))]
    if picked:  # the values below them are other defaults
        base = compose(name, [*rest, *groups])
    same = [word for word in groups if word not in picked]
    same += [word for word in others if word not in groups and _value(base, word) == _value(config, word)]
    return [word for word in overrides if word not in same]


def _value(config: DictConfig, word: str) -> object:
    """What stands at an override's key, as it is written; a new object where nothing stands."""
    missing = object()
    found = OmegaConf.select(config, key_of(word), default=missing)
    return OmegaConf.to_container(found) if OmegaConf.is_config(found) else found


def flatten(config: DictConfig) -> dict[str, object]:
    """Resolved leaves under dotted keys; a node that stands in several places is listed where it belongs."""
    return dict(leaves(_own(plain(config, resolve=False), plain(config))))


def _sweep() -> Path | None:
    """The folder of the sweep that this process is a job of."""
    multirun = HydraConfig.get().mode == RunMode.MULTIRUN
    return Path(HydraConfig.get().sweep.dir).absolute() if multirun else None


def _obey() -> None:
    """Begin no further job of a sweep after a stop was asked for, as the one before it ended, say."""
    try:
        stopping.obey()
    except StopRequestedError as stop:
        if sweep := _sweep():
            go_on = f"cl-moe resume={shlex.quote(str(sweep))}"
            stop.args = (f"stopped on request\nkept: the jobs that ended\ngo on: {go_on}",)
        raise


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
