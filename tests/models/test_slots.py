"""Which blocks take the expert layer, in both bodies."""

import pytest
import torch

from cl_moe.errors import InputError
from cl_moe.layers import PEER, DenseFFN, MoE
from cl_moe.models.slots import slot_blocks

TABLE = [
    ("all", 1, [0], 1),
    ("all", 3, [0, 1, 2], 3),
    ("every_other", 2, [1], 2),
    ("every_other", 5, [1, 3], 5),
    ("middle", 1, [0], 1),
    ("middle", 3, [1], 3),
    ("middle", 4, [2], 4),
    ("added", 1, [0], 2),
    ("added", 2, [1], 3),
    ("added", 4, [2], 5),
]


@pytest.mark.parametrize(("slots", "blocks", "chosen", "total"), TABLE)
def test_the_table_of_slots(slots: str, blocks: int, chosen: list[int], total: int) -> None:
    assert slot_blocks(slots, blocks) == (chosen, total)


@pytest.mark.parametrize(("slots", "blocks", "chosen", "total"), TABLE)
@pytest.mark.parametrize(("layer", "kind"), [("moe", MoE), ("peer", PEER)])
@pytest.mark.parametrize("body", ["mlp", "decoder"])
def test_bodies_fill_their_slots(
    new_mlp, new_decoder, slots: str, blocks: int, chosen: list[int], total: int, layer: str, kind, body: str
) -> None:
    model = (new_mlp if body == "mlp" else new_decoder)(layer, num_blocks=blocks, slots=slots)
    kinds = [type(part) for part in model.feed_forward]
    assert kinds == [kind if index in chosen else DenseFFN for index in range(total)]
    assert list(model.expert_layers) == chosen
    torch.manual_seed(0)
    inputs = torch.randn(5, 2, 4) if body == "mlp" else torch.randint(11, (3, 12))
    model.head.grow([0, 1]) if body == "mlp" else None
    logits, routings = model(inputs)
    assert logits.shape == ((5, 2) if body == "mlp" else (3, 12, 11))
    assert list(routings) == chosen, "routings are keyed by block"
    tokens = 5 if body == "mlp" else 36
    experts = {MoE: 4, PEER: 16}[kind]
    assert all((r.num_tokens, r.num_experts) == (tokens, experts) for r in routings.values())


@pytest.mark.parametrize("body", ["mlp", "decoder"])
@pytest.mark.parametrize("slots", ["all", "every_other", "middle", "added"])
def test_choosing_cohorts_passes_by_the_dense_blocks(new_mlp, new_decoder, body: str, slots: str) -> None:
    """A teacher asks for old cohorts of a model that has dense blocks too."""
    model = (new_mlp if body == "mlp" else new_decoder)("moe", num_blocks=3, slots=slots).eval()
    model.head.grow([0, 1]) if body == "mlp" else None
    torch.manual_seed(0)
    inputs = torch.randn(5, 2, 4) if body == "mlp" else torch.randint(11, (3, 12))
    with torch.no_grad():
        before, _ = model(inputs)
        for layer in model.expert_layers.values():
            layer.grow(3)
        old, routings = model(inputs, cohorts=range(1))
        assert torch.equal(old, before)
        assert all(bool((r.expert < 4).all()) for r in routings.values())
        assert not torch.equal(model(inputs)[0], before)


@pytest.mark.parametrize(
    ("slots", "blocks", "key"),
    [
        ("some", 3, "model.slots"),
        ("all", 0, "model.num_blocks"),
        ("every_other", 1, "model.num_blocks"),
        ("added", 0, "model.num_blocks"),
        ("middle", -1, "model.num_blocks"),
    ],
)
def test_slots_that_cannot_be(slots: str, blocks: int, key: str) -> None:
    with pytest.raises(InputError) as caught:
        slot_blocks(slots, blocks)
    assert caught.value.key == key
