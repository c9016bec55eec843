"""A model begins with the weights of another, where the two are alike outside their experts."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from cl_moe.layers.expert_layer import ExpertLayer


def inherit(model: nn.Module, values: Mapping[str, Tensor]) -> list[str]:
    """Take over what has the same name and shape and belongs to no expert layer of ``model``.

    Args:
        model: changed in place.
        values: a state dict of another model.

    Returns:
        The names that were taken.
    """
    layers = (name for name, part in model.named_modules() if isinstance(part, ExpertLayer) and part.cohorts)
    inside = tuple(f"{name}." for name in layers)
    own = model.state_dict()
    taken = {
        name: value
        for name, value in values.items()
        if name in own and own[name].shape == value.shape and not name.startswith(inside)
    }
    model.load_state_dict(own | taken)
    return list(taken)
