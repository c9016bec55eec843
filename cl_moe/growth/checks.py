"""What is refused before any training: growth that a model could not carry out, or over its budget."""

from __future__ import annotations

from collections.abc import Sequence

from cl_moe.errors import InputError
from cl_moe.growth.budget import sizes_after
from cl_moe.growth.pruning import NeverPrune, PrunePolicy
from cl_moe.growth.schedules import GrowthSchedule
from cl_moe.models.base import ContinualModel


def check_growth(
    model: ContinualModel, schedule: GrowthSchedule, num_experiences: int, classes: Sequence[int] = ()
) -> None:
    """Refuse, before any training, a growth that the model's layers could not carry out.

    Args:
        model: as it starts.
        schedule: asked what it would do before each experience.
        num_experiences: of the stream.
        classes: for each experience that is known, how many classes have head rows once it has come: they
            count in a budget, too; as many as the last behind them.

    Raises:
        InputError: there are no expert layers, or one of them cannot take a cohort of such a size.
    """
    if schedule.sizes and not model.expert_layers:
        raise InputError(
            got="growth of a model without experts",
            allowed="layer=moe, peer or pkm, or growth=never",
            key="layer",
        )
    plan = [(index, size) for index, size in enumerate(schedule.most(num_experiences)) if size]
    birth, budget = schedule.birth, schedule.birth.budget
    for layer in model.expert_layers.values():
        if not budget.bounded:
            layer.check_growths([size for _, size in plan], birth.init)
        if schedule.sizes and birth.hidden is not None:
            layer.check_hidden(birth.hidden, birth.init)
    if budget.bounded:
        _check_budget(model, schedule, plan, [*classes] or [0])


def _check_budget(
    model: ContinualModel,
    schedule: GrowthSchedule,
    plan: Sequence[tuple[int, int]],
    classes: Sequence[int],
) -> None:
    """Refuse what cannot be kept within a budget, and check the growths that are within it."""
    birth, budget = schedule.birth, schedule.birth.budget
    now, born = sizes_after(model, [], birth.hidden)[0], list[int]()
    if budget.exceeded(now):
        raise budget.refusal(now, 0)
    for index, size in plan:
        for layer in model.expert_layers.values():
            layer.check_growths([*born, size], birth.init)
        rows = classes[min(index, len(classes) - 1)]
        then = sizes_after(model, [*born, size], birth.hidden, rows)[-1]
        if not budget.exceeded(then):
            born.append(size)
        elif budget.on_exceed == "refuse" and schedule.planned:
            raise budget.refusal(then, index)


def check_prune(model: ContinualModel, policy: PrunePolicy) -> None:
    """Refuse, before any training, a policy that the model's layers could not carry out.

    Raises:
        InputError: there are no expert layers, or their experts cannot start anew one by one.
    """
    if not isinstance(policy, NeverPrune) and not model.expert_layers:
        raise InputError(
            got="pruning of a model without experts",
            allowed="layer=moe, peer or pkm, or prune=never",
            key="layer (or prune)",
        )
    if policy.recycles:
        for layer in model.expert_layers.values():
            layer.recycle(())
