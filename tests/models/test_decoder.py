"""The decoder: causal, blind to padding."""

import pytest
import torch

from cl_moe.errors import InputError
from cl_moe.layers import DenseFFN
from cl_moe.models import DecoderLM

LAYERS = ["dense", "moe", "switch", "gshard", "peer", "pkm"]


def tokens(rows: int = 4, length: int = 12) -> torch.Tensor:
    return torch.randint(11, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("slots", ["all", "middle", "added"])
def test_the_future_does_not_reach_the_past(new_decoder, layer: str, slots: str) -> None:
    model = new_decoder(layer, num_blocks=2, slots=slots).eval()
    inputs = tokens()
    for position in (1, 6, 11):
        changed = inputs.clone()
        changed[:, position:] = (changed[:, position:] + 3) % 11
        with torch.no_grad():
            before, after = model(inputs)[0], model(changed)[0]
        torch.testing.assert_close(before[:, :position], after[:, :position], rtol=0, atol=1e-5)
        assert (before[:, position] - after[:, position]).abs().max() > 1e-3, "the present does"


@pytest.mark.parametrize("layer", LAYERS)
def test_the_past_reaches_the_future(new_decoder, layer: str) -> None:
    model, inputs = new_decoder(layer).eval(), tokens()
    changed = inputs.clone()
    changed[:, 0] = (changed[:, 0] + 3) % 11
    with torch.no_grad():
        moved = (model(inputs)[0] - model(changed)[0]).abs().amax(dim=(0, 2))
    assert (moved > 1e-4).all(), "attention carries the first token everywhere"


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("training", [False, True])
def test_padding_at_the_end_changes_nothing_else(new_decoder, layer: str, training: bool) -> None:
    model, inputs = new_decoder(layer, num_blocks=2, slots="all").train(training), tokens()
    mask = torch.arange(12) < torch.tensor([[12], [9], [5], [1]])
    other = torch.where(mask, inputs, (inputs + 5) % 11)
    with torch.no_grad():
        torch.manual_seed(0)  # a router may draw while it trains
        first, routings = model(inputs, mask=mask)
        torch.manual_seed(0)
        second, _ = model(other, mask=mask)
    torch.testing.assert_close(first[mask], second[mask], rtol=0, atol=1e-5)
    for routing in routings.values():
        token, _, weight, kept = routing.pairs()
        assert not kept[~mask.flatten()[token]].any()
        assert (weight[~mask.flatten()[token]] == 0).all()


@pytest.mark.parametrize("layer", LAYERS)
def test_a_padded_row_equals_the_short_row(new_decoder, layer: str) -> None:
    model, inputs = new_decoder(layer).eval(), tokens()
    mask = (torch.arange(12) < 7).expand(4, 12)
    with torch.no_grad():
        padded, short = model(inputs, mask=mask)[0], model(inputs[:, :7])[0]
    torch.testing.assert_close(padded[:, :7], short, rtol=0, atol=1e-5)


def test_positions_count(new_decoder) -> None:
    model = new_decoder("dense").eval()
    same = torch.full((1, 12), 4)
    logits = model(same)[0][0]
    assert (logits[0] - logits[5]).abs().max() > 1e-3


def test_the_head_covers_the_vocabulary_from_the_start(new_decoder) -> None:
    model = new_decoder("moe")
    assert model.kind == "language"
    assert model.head.classes == list(range(11))
    assert len(model.head.cohorts) == 1


@pytest.mark.parametrize(
    ("options", "key"), [({"num_heads": 3}, "model.num_heads"), ({"slots": "none"}, "model.slots")]
)
def test_what_cannot_be_built_is_refused(new_decoder, options: dict[str, object], key: str) -> None:
    with pytest.raises(InputError) as caught:
        new_decoder("dense", **options)
    assert caught.value.key == key


def test_a_context_too_long_is_refused() -> None:
    model = DecoderLM((4,), 5, DenseFFN, width=8, num_heads=2)
    with pytest.raises(InputError) as caught:
        model(torch.zeros(1, 5, dtype=torch.long))
    assert caught.value.key == "stream.context"
