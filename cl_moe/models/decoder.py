"""A small decoder-only language model, causal, pre-norm.

Legend: B batch, S positions, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from cl_moe.layers.routing import Routing
from cl_moe.models.base import Head
from cl_moe.models.slots import LayerFactory
from cl_moe.models.transformer import Blocks, Depth, TransformerBody, context_length, draw_tables, embed


class DecoderLM(TransformerBody):
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
        depth: Mixture-of-Depths, and
        attention_slots: projections made of experts: see ``Blocks``.

    Raises:
        InputError: also for a layer whose choice depends on the future.
    """

    kind = "language"
    causal = True

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
        depth: Depth = None,
        attention_slots: str | Sequence[str] = "none",
    ) -> None:
        super().__init__()
        self.context = context_length(input_shape)
        self.tokens = nn.Embedding(num_classes, width)
        self.positions = nn.Embedding(self.context, width)
        self._add_blocks(
            layer, Blocks(width, num_blocks, num_heads, ffn_hidden, slots, depth, attention_slots)
        )
        self.head = Head(width)
        self.head.grow(range(num_classes))
        draw_tables(self.tokens, self.positions)

    def forward(
        self, inputs: Tensor, mask: Tensor | None = None, cohorts: Sequence[int] | None = None
    ) -> tuple[Tensor, dict[int, Routing]]:
        """Logits (B, S, V) of tokens (B, S), and the routings by block."""
        x_BSD = embed(inputs, self.tokens, self.positions)
        out_BSD, routings = self._through_blocks(x_BSD, mask, cohorts)
        return self.head(out_BSD), routings
