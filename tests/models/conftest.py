"""Layers and bodies to put together."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

from cl_moe.layers import PEER, PKM, DenseFFN, GShard, MoE, Switch, TopK
from cl_moe.models import DecoderLM, MLPClassifier
from cl_moe.seeds import seeded

LAYERS = {
    "moe": partial(MoE, num_experts=4, hidden=8, router=partial(TopK, k=2)),
    "switch": partial(MoE, num_experts=4, hidden=8, router=Switch),
    "gshard": partial(MoE, num_experts=4, hidden=8, router=partial(GShard, second="none")),
    "peer": partial(PEER, num_experts=16, heads=2, k=4, key_dim=8),
    "pkm": partial(PKM, num_experts=16, heads=2, k=4, key_dim=8),
    "dense": DenseFFN,
}


@pytest.fixture
def new_mlp() -> Callable[..., MLPClassifier]:
    def build(layer: str = "dense", **options: object) -> MLPClassifier:
        with seeded(0, "init"):
            return MLPClassifier((2, 4), 6, LAYERS[layer], **({"width": 8} | options))

    return build


@pytest.fixture
def new_decoder() -> Callable[..., DecoderLM]:
    def build(layer: str = "dense", **options: object) -> DecoderLM:
        with seeded(0, "init"):
            model = DecoderLM((12,), 11, LAYERS[layer], **({"width": 16, "num_heads": 2} | options))
            for table in (model.tokens, model.positions):  # far enough apart that tokens are routed apart
                torch.nn.init.normal_(table.weight)
            return model

    return build
