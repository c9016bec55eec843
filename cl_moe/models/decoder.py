"""A small decoder-only language model, causal, pre-norm.

Legend: B batch, S positions, D width, H heads, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from cl_moe.errors import InputError
from cl_moe.layers.routing import Routing
from cl_moe.models.base import ContinualModel, Head
from cl_moe.models.slots import LayerFactory, fill_slots, slot_blocks


class CausalAttention(nn.Module):
    """Multi-head self-attention in which a position sees itself and its past."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        if width % num_heads:
            raise InputError(
                got=f"num_heads={num_heads} for width={width}",
                allowed="a divisor of the width",
                key="model.num_heads",
            )
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """(B, S, D) to (B, S, D)."""
        batch, length, width = x_BSD.shape
        heads = self.qkv(x_BSD).view(batch, length, 3, self.num_heads, width // self.num_heads)
        q_BHSd, k_BHSd, v_BHSd = heads.permute(2, 0, 3, 1, 4).unbind(0)
        mixed_BHSd = F.scaled_dot_product_attention(q_BHSd, k_BHSd, v_BHSd, is_causal=True)
        return self.out(mixed_BHSd.transpose(1, 2).reshape(batch, length, width))


class Mixer(nn.Module):
    """What a block does before its feed-forward slot: attention, with its norm, added to the stream."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.attention = CausalAttention(width, num_heads)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """(B, S, D) to (B, S, D)."""
        return x_BSD + self.attention(self.norm(x_BSD))


class DecoderLM(ContinualModel):
    """Token and position embeddings, blocks of attention and a feed-forward slot, a head over the vocabulary.

    Padding stands at the end of a sequence only, so causal attention needs no mask for it; the mask goes to
    the expert layers, whose routers, losses and counts must not see it.

    Args:
        input_shape: ``(S,)``, the context length.
        num_classes: V, the vocabulary size (256 for bytes).
        layer: factory of the layer in the slots, called with ``dim``.
        width: D.
        num_blocks: blocks of attention and feed-forward.
        num_heads: attention heads.
        ffn_hidden: inner width of the dense feed-forward layers; None for one linear map.
        slots: which blocks take ``layer``: see ``slot_blocks``.
    """

    kind = "language"

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        layer: LayerFactory,
        width: int = 64,
        num_blocks: int = 3,
        num_heads: int = 4,
        ffn_hidden: int | None = 256,
        slots: str = "middle",
    ) -> None:
        super().__init__()
        (self.context,) = input_shape
        added = slot_blocks(slots, num_blocks)[0] if slots == "added" else []
        self.tokens = nn.Embedding(num_classes, width)
        self.positions = nn.Embedding(self.context, width)
        self.blocks = fill_slots(slots, num_blocks, width, layer, ffn_hidden, "gelu")
        # An added block is the layer alone: no attention of its own.
        self.mixers = nn.ModuleList(
            nn.Identity() if index in added else Mixer(width, num_heads) for index in range(len(self.blocks))
        )
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in self.blocks)
        self.norm = nn.RMSNorm(width)
        self.head = Head(width)
        self.head.grow(range(num_classes))
        for table in (self.tokens, self.positions):
            nn.init.normal_(table.weight, std=0.02)

    @property
    def feed_forward(self) -> Sequence[nn.Module]:
        """The layer of each block."""
        return list(self.blocks)

    def forward(
        self, inputs: Tensor, mask: Tensor | None = None, cohorts: Sequence[int] | None = None
    ) -> tuple[Tensor, dict[int, Routing]]:
        """Logits (B, S, V) of tokens (B, S), and the routings by block."""
        length = inputs.shape[1]
        if length > self.context:
            raise InputError(
                got=f"{length} tokens", allowed=f"at most {self.context}, the context", key="stream.context"
            )
        x_BSD = self.tokens(inputs) + self.positions(torch.arange(length, device=inputs.device))
        routings = {}
        for index, (mixer, norm, block) in enumerate(zip(self.mixers, self.norms, self.blocks, strict=True)):
            x_BSD = mixer(x_BSD)
            out_BSD, routing = block(norm(x_BSD), mask=mask, cohorts=cohorts)
            x_BSD = x_BSD + out_BSD
            if routing.num_experts:
                routings[index] = routing
        return self.head(self.norm(x_BSD)), routings
