"""Classifiers made of transformer blocks: patches, texts, padding, and that they learn."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from cl_moe.errors import InputError
from cl_moe.layers import DenseFFN, MoE, TopK
from cl_moe.models import DecoderClassifier, EncoderClassifier, PatchTransformer
from cl_moe.seeds import generator, seeded
from cl_moe.stream import Stream
from tasks.split_texts import split_texts

MOE = partial(MoE, num_experts=4, hidden=8, router=partial(TopK, k=2))
SMALL = {"width": 16, "num_heads": 2, "ffn_hidden": 16}
TEXT_BODIES = [EncoderClassifier, DecoderClassifier]


@pytest.mark.parametrize("shape", [(64,), (8, 8), (3, 8, 12), (784,), (28, 28), (1, 28, 28)])
def test_patches_are_cut_row_by_row(shape: tuple[int, ...]) -> None:
    model = PatchTransformer(shape, 10, DenseFFN, **SMALL, patch_size=4)
    images = torch.randn(2, *shape)
    channels, high, wide = model.image
    whole = images.reshape(2, channels, high, wide)
    cut = [
        whole[:, :, y : y + 4, x : x + 4].reshape(2, -1) for y in range(0, high, 4) for x in range(0, wide, 4)
    ]
    assert torch.equal(model.patches(images), torch.stack(cut, dim=1))
    model.head.grow([4, 2])
    assert model(images)[0].shape == (2, 2)


def test_the_place_of_a_patch_counts() -> None:
    model = PatchTransformer((16,), 2, DenseFFN, **SMALL).eval()
    model.head.grow([0, 1])
    image = torch.zeros(1, 4, 4)
    image[0, :2, :2] = 1.0
    moved = image.roll((2, 2), dims=(1, 2))
    assert (model(image.flatten(1))[0] - model(moved.flatten(1))[0]).abs().max() > 1e-5


@pytest.mark.parametrize("body", TEXT_BODIES)
@pytest.mark.parametrize("options", [{}, {"depth": 0.5}, {"attention_slots": ["query", "output"]}])
@pytest.mark.parametrize("training", [True, False])
def test_a_padded_text_equals_the_short_one(body, options: dict, training: bool) -> None:
    with seeded(0):
        model = body((12,), 3, MOE, **SMALL, slots="all", **options).train(training)
        model.head.grow([0, 1, 2])
    short = torch.randint(1, 256, (3, 7), generator=generator(0))
    padded = torch.cat([short, torch.zeros(3, 5, dtype=torch.int64)], dim=1)
    (out, routings), (expected, plain) = model(padded), model(short)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    for key in plain:
        for name, loss in plain[key].losses.items():
            torch.testing.assert_close(routings[key].losses[name], loss, rtol=1e-4, atol=1e-5)
    assert not model(torch.zeros(2, 4, dtype=torch.int64))[0].isnan().any(), "a text of nothing"


def test_what_is_no_image_or_no_text_is_refused() -> None:
    for shape, key in (((63,), "model (or stream)"), ((2, 3, 4, 5), "model (or stream)")):
        with pytest.raises(InputError) as caught:
            PatchTransformer(shape, 10, DenseFFN)
        assert caught.value.key == key
    with pytest.raises(InputError) as caught:
        PatchTransformer((64,), 10, DenseFFN, patch_size=3)
    assert caught.value.key == "model.patch_size"
    for model, inputs in (
        (PatchTransformer((64,), 10, DenseFFN), torch.zeros(2, 64, dtype=torch.int64)),
        (EncoderClassifier((64,), 10, DenseFFN), torch.zeros(2, 64)),
        (DecoderClassifier((64,), 10, DenseFFN), torch.zeros(2, 65, dtype=torch.int64)),
    ):
        with pytest.raises(InputError, match="change: stream"):
            model(inputs)


@pytest.fixture(scope="module")
def texts() -> Stream:
    return split_texts(
        domains=["python_code", "bible_es"], context=32, train_windows=200, test_windows=50, data_seed=0
    )


def shown(stream: Stream, split: str) -> tuple[Tensor, Tensor]:
    inputs, targets = getattr(stream[0], split).tensors
    order = torch.randperm(len(inputs), generator=generator(0, split))
    return inputs[order], targets[order]


@pytest.mark.parametrize("body", TEXT_BODIES)
@pytest.mark.parametrize("options", [{}, {"depth": {"capacity": 0.5}}])
def test_a_text_classifier_beats_chance(body, options: dict, texts: Stream) -> None:
    with seeded(0):
        model = body((32,), 2, MOE, **SMALL, **options)
        model.head.grow([0, 1])
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        inputs, targets = shown(texts, "train")
        for _ in range(3):
            for rows in torch.arange(len(inputs)).split(20):
                logits, routings = model(inputs[rows])
                loss = torch.nn.functional.cross_entropy(logits, targets[rows])
                loss = loss + sum(term for routing in routings.values() for term in routing.losses.values())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        inputs, targets = shown(texts, "test")
        with torch.no_grad():
            right = (model.eval()(inputs)[0].argmax(dim=1) == targets).float().mean()
    assert right > 0.75, "chance is .5"
