"""A multi-layer perceptron for classification, the body of the classic continual-learning protocols.

Legend: B batch, D width, C classes known so far.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from cl_moe.layers.routing import Routing
from cl_moe.models.base import ContinualModel, Head
from cl_moe.models.slots import LayerFactory, fill_slots, slot_blocks


class MLPClassifier(ContinualModel):
    """Stem, feed-forward slots, growing head; ReLU after the stem and after each slot.

    With ``layer=dense`` and ``ffn_hidden=None`` a slot is one linear map, so ``width=256, num_blocks=1`` on
    64 inputs is the plain 64-256-256-C network of the peers' protocol.

    Args:
        input_shape: shape of one input; flattened.
        num_classes: classes of the whole stream; not used, the head grows as classes arrive.
        layer: factory of the layer in the slots, called with ``dim``.
        width: hidden units D.
        num_blocks: feed-forward slots.
        ffn_hidden: inner width of dense slots; None for one linear map.
        slots: which blocks take ``layer``: see ``slot_blocks``.
        residual: add a slot's input to its output before the ReLU.

    Raises:
        InputError: also for a router of whose experts none would ever have a slot for a single token.
    """

    kind = "classification"

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        layer: LayerFactory,
        width: int = 256,
        num_blocks: int = 1,
        ffn_hidden: int | None = None,
        slots: str = "all",
        residual: bool = False,
    ) -> None:
        super().__init__()
        self.residual = residual
        self.added = slot_blocks(slots, num_blocks)[0] if slots == "added" else []
        self.stem = nn.Linear(math.prod(input_shape), width)
        self.blocks = fill_slots(slots, num_blocks, width, layer, ffn_hidden, "relu")
        self.relus = nn.ModuleList(nn.ReLU() for _ in self.blocks)
        for slot in self.expert_layers.values():
            slot.check_length(1)  # every input is one token
        self.head = Head(width)

    @property
    def feed_forward(self) -> Sequence[nn.Module]:
        """The layer of each block."""
        return list(self.blocks)

    @property
    def cuts(self) -> Sequence[nn.Module]:
        """The stem, before its ReLU, and the ReLU behind every slot."""
        return [self.stem, *self.relus]

    @property
    def units_behind(self) -> Mapping[int, nn.Module]:
        """The ReLU behind every slot."""
        return dict(enumerate(self.relus))

    def forward(
        self, inputs: Tensor, mask: Tensor | None = None, cohorts: Sequence[int] | None = None
    ) -> tuple[Tensor, dict[int, Routing]]:
        """Logits (B, C) of ``inputs`` (B, ...), and the routings by block."""
        x_BD = torch.relu(self.stem(inputs.flatten(1)))
        routings = {}
        for index, (block, relu) in enumerate(zip(self.blocks, self.relus, strict=True)):
            out_BD, routing = block(x_BD, mask=mask, cohorts=cohorts)
            if routing.num_experts:
                routings[index] = routing
            # A block of its own beside the dense ones has to be a residual one, or it would replace them.
            x_BD = relu(x_BD + out_BD if self.residual or index in self.added else out_BD)
        return self.head(x_BD), routings
