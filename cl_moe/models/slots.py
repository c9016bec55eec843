"""Which blocks of a model take the expert layer in their feed-forward slot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

from torch import nn

from cl_moe.errors import InputError
from cl_moe.layers.dense import DenseFFN
from cl_moe.layers.expert_layer import ExpertLayer

Slots = Literal["all", "every_other", "middle", "added"]
LayerFactory = Callable[..., ExpertLayer]


def slot_blocks(slots: str, num_blocks: int) -> tuple[list[int], int]:
    """Block indices that take the layer, and how many blocks there are in all.

    ``all``; ``every_other``: blocks 1, 3, ..., as Switch and GShard do; ``middle``: block
    ``num_blocks // 2``, where PEER stands; ``added``: every block stays dense, and one more block, the layer
    alone, is put into the middle.

    >>> slot_blocks("every_other", 4), slot_blocks("middle", 3), slot_blocks("added", 2)
    (([1, 3], 4), ([1], 3), ([1], 3))
    """
    if slots not in get_args(Slots):
        raise InputError(got=f"slots={slots!r}", allowed=", ".join(get_args(Slots)), key="model.slots")
    smallest = 2 if slots == "every_other" else 1
    if num_blocks < smallest:
        raise InputError(
            got=f"num_blocks={num_blocks} with slots={slots}",
            allowed=f"at least {smallest}",
            key="model.num_blocks",
        )
    if slots == "all":
        return list(range(num_blocks)), num_blocks
    if slots == "every_other":
        return list(range(1, num_blocks, 2)), num_blocks
    return [num_blocks // 2], num_blocks + (slots == "added")


def fill_slots(
    slots: str, num_blocks: int, width: int, layer: LayerFactory, ffn_hidden: int | None, activation: str
) -> nn.ModuleList:
    """One feed-forward layer per block: the expert layer where it belongs, a dense one elsewhere."""
    chosen, total = slot_blocks(slots, num_blocks)
    return nn.ModuleList(
        layer(dim=width) if index in chosen else DenseFFN(width, ffn_hidden, activation)
        for index in range(total)
    )
