"""Numbers from numbers: feed-forward slots between what is given and what is asked, and nothing else.

Legend: B batch, S samples, D features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from cl_moe.layers.routing import Routing
from cl_moe.models.base import ContinualModel, Head
from cl_moe.models.slots import LayerFactory, fill_slots, slot_blocks


class Regressor(ContinualModel):
    """A number for every sample: the first of what the last slot gives, ReLU between slots.

    With one slot of experts that are one linear map (``layer=moe layer.hidden=null``), or ``layer=dense``, it
    is linear regression, as in the theory of continual mixtures (2406.16437); there is no read-out that
    experts would share. What is not read of the last slot gets no gradient.

    Args:
        input_shape: of one input: ``(..., D)``; everything before D numbers samples.
        num_classes: not used, numbers have none.
        layer: factory of the layer in the slots, called with ``dim``.
        num_blocks: feed-forward slots.
        ffn_hidden: inner width of dense slots; None for one linear map.
        slots: which blocks take ``layer``: see ``slot_blocks``.
    """

    kind = "regression"

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        layer: LayerFactory,
        num_blocks: int = 1,
        ffn_hidden: int | None = None,
        slots: str = "all",
    ) -> None:
        super().__init__()
        self.added = slot_blocks(slots, num_blocks)[0] if slots == "added" else []
        self.blocks = fill_slots(slots, num_blocks, input_shape[-1], layer, ffn_hidden, "relu")
        self.relus = nn.ModuleList(nn.ReLU() for _ in self.blocks[:-1])
        for slot in self.expert_layers.values():
            slot.check_length(input_shape[-2] if len(input_shape) > 1 else 1)
        self.head = Head(input_shape[-1])

    @property
    def feed_forward(self) -> Sequence[nn.Module]:
        """The layer of each block."""
        return list(self.blocks)

    @property
    def cuts(self) -> Sequence[nn.Module]:
        """The ReLU between slots."""
        return list(self.relus)

    @property
    def units_behind(self) -> Mapping[int, nn.Module]:
        """The ReLU behind every slot but the last."""
        return dict(enumerate(self.relus))

    def forward(
        self, inputs: Tensor, mask: Tensor | None = None, cohorts: Sequence[int] | None = None
    ) -> tuple[Tensor, dict[int, Routing]]:
        """(B, ...) numbers for ``inputs`` (B, ..., D), and the routings by block."""
        x, routings = inputs, {}
        for index, block in enumerate(self.blocks):
            out, routing = block(x, mask=mask, cohorts=cohorts)
            if routing.num_experts:
                routings[index] = routing
            x = x + out if index in self.added else out
            x = self.relus[index](x) if index < len(self.relus) else x
        return x[..., 0], routings
