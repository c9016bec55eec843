"""A student run that learns from a finished one: the teacher is found, built from a checkpoint, handed in."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import nn

from cl_moe import branching, checkpoint
from cl_moe.arguments import branch_point
from cl_moe.checkpoint import Branch
from cl_moe.errors import InputError
from cl_moe.folder import read_config
from cl_moe.loading import rebuilt
from cl_moe.models import ContinualModel
from cl_moe.models.inherit import inherit
from cl_moe.strategies import DistillFrom, Strategy
from cl_moe.stream import Stream
from cl_moe.targets import check_targets


def teacher_of(config: DictConfig) -> Branch | None:
    """Where a configured run's teacher was saved, if it has one.

    Raises:
        InputError: no such run or boundary.
    """
    if config.distill is None:
        return None
    uri = config.tracking.get("uri")
    teacher = Branch(*branch_point(config.distill, *([uri] if uri else []), key="distill"))
    branching.check_boundary(teacher, "distill")
    return teacher


def attach(teacher: Branch | None, stream: Stream, model: nn.Module, strategies: list[Strategy]) -> None:
    """Give the teacher to the strategy that learns from it, and its weights outside experts to the student.

    Raises:
        InputError: one of the two is missing, or the teacher learnt another stream.
    """
    students = [strategy for strategy in strategies if isinstance(strategy, DistillFrom)]
    if (teacher is None) != (not students):
        raise InputError(
            got="strategy=distill_from without a teacher" if students else "a teacher and nobody to listen",
            allowed="distill=<run id or run folder> beside distill_from among the strategies, or neither "
            "(distill=null)",
            key="distill" if students else "strategy",
        )
    if teacher is None:
        return
    built, _ = load_model(teacher, stream)
    inherit(model, built.state_dict())
    for student in students:
        student.learn_from(built)


def load_model(
    point: Branch, stream: Stream, key: str = "distill"
) -> tuple[ContinualModel, list[dict[str, Any]]]:
    """The model of a run as it stood at a boundary, and its ledger.

    Args:
        point: the run's folder, and the boundary.
        stream: that it is to be used on; the run must have learnt the same.
        key: the argument that named the run.

    Raises:
        InputError: it has not, or the checkpoint or the stored configuration is not good.
    """
    config = OmegaConf.create(read_config(point.folder, key))
    check_targets(config)

    def refuse(state: checkpoint.State) -> str | None:
        learnt = state.get("fingerprint", {}).get("stream", ["?"])[0]
        return None if learnt == stream.name else f"is of the stream {learnt}, not {stream.name}"

    state = checkpoint.at(point, refuse, key)["learner"]
    try:
        model = rebuilt(config, state["ledger"], state["model"], stream.input_shape, stream.num_classes)
    except RuntimeError as error:
        raise InputError(
            got=f"a run whose weights do not fit its model on this stream: {point.folder}",
            allowed="inputs and classes as that run had them",
            key=f"stream (or {key})",
        ) from error
    return model, state["ledger"]


def tags(teacher: Branch, config: DictConfig) -> dict[str, str]:
    """The teacher's run id and the boundary; MLflow's own link where both runs are in one store."""
    labels = branching.tags(teacher, config)
    return {"teacher" if name == "branch" else name: value for name, value in labels.items()}
