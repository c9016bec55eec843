"""A configuration may only name builders of this program's parts: it cannot have other code called.

Hydra calls what stands behind ``_target_``, at any depth. It forbids the functions that it knows to run code,
and calls that no boundary: pandas.read_pickle is none of them. A run's folder may come from somebody else, so
all targets are looked at before any of them is called.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_type_hints

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from cl_moe.checkpoint import Checkpoints
from cl_moe.engines import Engine
from cl_moe.errors import InputError
from cl_moe.growth import FreezePolicy, GrowthBudget, GrowthSchedule, PrunePolicy
from cl_moe.layers.expert_layer import ExpertLayer
from cl_moe.layers.retrieval import Retrieval
from cl_moe.layers.routers import Capacity, Router, Scores
from cl_moe.measuring import Measuring
from cl_moe.models import ContinualModel
from cl_moe.optim import OptimizerSpec
from cl_moe.spending import Budget
from cl_moe.strategies import Strategy
from cl_moe.stream import Stream
from cl_moe.tracking.tracker import Tracker
from cl_moe.trainer import TrainerSpec

PARTS: tuple[type, ...] = (
    *(Stream, ContinualModel, ExpertLayer, Router, Scores, Capacity, GrowthSchedule, FreezePolicy),
    *(
        Budget,
        GrowthBudget,
        PrunePolicy,
        Retrieval,
        Strategy,
        OptimizerSpec,
        TrainerSpec,
        Engine,
        Tracker,
        Checkpoints,
        Measuring,
    ),
)


def check_targets(config: DictConfig) -> None:
    """Refuse targets that build none of ``PARTS``; nothing is called.

    A class must be one of them or derive from one; a function must say so by its return annotation.

    Raises:
        InputError: the target, and where it stands.
    """
    for place, target in _targets(OmegaConf.to_container(config, resolve=True)):
        if not isinstance(target, str) or not _builds_a_part(target):
            names = ", ".join(part.__name__ for part in PARTS)
            raise InputError(
                got=f"{place}={target}, which does not say that it builds a part of a run",
                allowed=f"a class of, or a function annotated to return: {names}",
                key=place,
            )


def _targets(tree: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            name = f"{place}.{key}" if place else str(key)
            if key == "_target_":
                yield name, value
            else:
                yield from _targets(value, name)
    elif isinstance(tree, Sequence) and not isinstance(tree, str):
        for index, value in enumerate(tree):
            yield from _targets(value, f"{place}.{index}")


def _builds_a_part(target: str) -> bool:
    if target.split(".")[0] in sys.stdlib_module_names:
        return False  # before it is imported
    found = get_object(target)
    if inspect.isfunction(found):
        try:
            found = get_type_hints(found).get("return")
        except (NameError, TypeError):  # its annotations name what is not there
            return False
    return inspect.isclass(found) and issubclass(found, PARTS)
