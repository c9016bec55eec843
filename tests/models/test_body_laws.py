"""What holds for every body: batches of nothing, activation checkpointing, and dense projections.

Legend: B batch, S positions, D width.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cl_moe.layers import PEER, PKM, DenseFFN, GShard, MoE, Scores, Switch, TopK, fold_load
from cl_moe.models import (
    ContinualModel,
    DecoderClassifier,
    DecoderLM,
    EncoderClassifier,
    EncoderLM,
    MLPClassifier,
    PatchTransformer,
)
from cl_moe.seeds import seeded

FEW = partial(MoE, num_experts=4, hidden=8)
LAYERS = {
    "dense": partial(DenseFFN, hidden=8),
    "top_k": partial(FEW, router=partial(TopK, scores=Scores("sigmoid", 1e-3)), dropout=0.2),
    "switch": partial(FEW, router=Switch),
    "gshard": partial(FEW, router=partial(GShard, second="none")),
    "peer": partial(PEER, num_experts=16, heads=2, k=4),
    "pkm": partial(PKM, num_experts=16, heads=2, k=4),
}
SMALL = {"width": 8, "num_heads": 2, "num_blocks": 2, "ffn_hidden": 8, "slots": "all"}
BODIES = {
    "mlp": partial(MLPClassifier, (64,), 3, width=8, num_blocks=2),
    "decoder": partial(DecoderLM, (8,), 11, **SMALL),
    "encoder": partial(EncoderLM, (8,), 11, **SMALL),
    "encoder_classifier": partial(EncoderClassifier, (8,), 3, vocabulary=11, **SMALL),
    "decoder_classifier": partial(DecoderClassifier, (8,), 3, vocabulary=11, **SMALL),
    "patch_transformer": partial(PatchTransformer, (64,), 3, **SMALL),
}
EXTRAS = {
    "depth": {"depth": {"capacity": 0.5, "every": 1}},
    "slots": {"attention_slots": ["query", "output"]},
}
ALL = [(body, {}) for body in BODIES] + [
    (b, extra) for b in BODIES if b != "mlp" for extra in EXTRAS.values()
]
every_body = pytest.mark.parametrize(("body", "options"), ALL)
every_layer = pytest.mark.parametrize("layer", LAYERS)


def build(body: str, layer: str, options: dict) -> ContinualModel:
    with seeded(0):
        model = BODIES[body](layer=LAYERS[layer], **options)
        if not model.head.classes:
            model.head.grow([0, 1, 2])
    return model


def inputs_of(body: str, rows: int) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    if body in ("mlp", "patch_transformer"):
        return torch.randn(rows, 64, generator=draw)
    return torch.randint(1, 11, (rows, 8), generator=draw)


@every_body
@every_layer
@pytest.mark.parametrize("training", [True, False])
def test_a_batch_of_nothing_gives_nothing(body: str, options: dict, layer: str, training: bool) -> None:
    model = build(body, layer, options).train(training)
    logits, routings = model(inputs_of(body, 0))
    full, keys = model(inputs_of(body, 2))
    assert logits.shape == (0, *full.shape[1:])
    assert routings.keys() == keys.keys()
    assert all(fold_load(routing).count.sum() == 0 for routing in routings.values())


@every_body
@every_layer
def test_checkpointing_changes_no_count_and_no_gradient(body: str, options: dict, layer: str) -> None:
    results = []
    for wrapped in (False, True):
        model = build(body, layer, options)
        inputs = inputs_of(body, 3)
        torch.manual_seed(1)
        run = partial(checkpoint, model, use_reentrant=False) if wrapped else model
        logits, routings = run(inputs)
        losses = [loss for routing in routings.values() for loss in routing.losses.values()]
        (logits.square().sum() + sum(losses)).backward()
        loads = [part for routing in routings.values() for part in fold_load(routing)]
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        results.append([logits, *loads, *grads, *model.state_dict().values()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("body", [body for body in BODIES if body != "mlp"])
def test_with_a_dense_layer_a_projection_stays_one_linear_map(body: str) -> None:
    slots = {"attention_slots": ["query", "key", "value", "output"]}
    plain, asked = build(body, "dense", {}), build(body, "dense", slots)
    asked.load_state_dict(plain.state_dict())  # the same names and shapes
    inputs = inputs_of(body, 2)
    assert torch.equal(asked(inputs)[0], plain(inputs)[0])
    assert not any(isinstance(part, DenseFFN) for mixer in asked.mixers for part in mixer.modules())
    mixed = build(body, "switch", slots)
    assert all(
        len(mixer.attention.experts) == 4 for mixer in mixed.mixers if not isinstance(mixer, nn.Identity)
    )


@pytest.mark.parametrize("body", ["encoder_classifier", "decoder_classifier"])
@pytest.mark.parametrize("layer", ["dense", "top_k", "peer"])
def test_a_mask_of_real_tokens_alone_is_no_mask(
    monkeypatch: pytest.MonkeyPatch, body: str, layer: str
) -> None:
    """Where asking for padding would make every step wait, the mask is always given."""
    model, inputs = build(body, layer, {}).eval(), inputs_of(body, 3)
    plain, _ = model(inputs)
    masks = []
    through = type(model)._through_blocks
    monkeypatch.setattr(
        type(model),
        "_through_blocks",
        lambda self, x, mask, c: masks.append(mask) or through(self, x, mask, c),
    )
    model(inputs)
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        masked, _ = model(inputs)
    assert masks[0] is None
    assert masks[1] is not None
    torch.testing.assert_close(masked, plain, rtol=1e-4, atol=1e-5)
