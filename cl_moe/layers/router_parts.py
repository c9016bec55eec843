"""Which parameters and buffers choose, as opposed to those that compute what was chosen."""

from __future__ import annotations

from torch import nn


def router_names(model: nn.Module) -> list[str]:
    """Names, as in ``state_dict``, of everything that a model's routers choose by.

    A module that holds parts of a router says so in ``router_parts``, a tuple of names of its parameters,
    buffers or children: a cohort its keys and selection biases, a product-key layer its query net with its
    statistics, a ``DepthRouter`` its score and its predictor. Experts shared by all tokens choose nothing.

    >>> from cl_moe.layers import MoE
    >>> router_names(MoE(dim=4, num_experts=2))
    ['cohorts.0.key']
    """
    names = list(model.state_dict())
    places = [
        f"{prefix}.{part}" if prefix else part
        for prefix, module in model.named_modules()
        for part in getattr(module, "router_parts", ())
    ]
    return [name for name in names if any(name == place or name.startswith(f"{place}.") for place in places)]
