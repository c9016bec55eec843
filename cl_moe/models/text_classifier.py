"""Text classifiers: an encoder or a decoder that reads a text, and a head that grows with the classes.

Legend: B batch, S positions, D width, C classes known so far.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cl_moe.layers.routing import Routing
from cl_moe.models.base import Head
from cl_moe.models.slots import LayerFactory
from cl_moe.models.transformer import Blocks, Depth, TransformerBody, context_length, draw_tables, embed

PADDING = 0
"""The token behind the end of a text that is shorter than the context; byte 0 stands in no text."""


class TextClassifier(TransformerBody):
    """What both classifiers share; they differ in what a position sees and in how a text becomes one vector.

    Args:
        input_shape: ``(S,)``, the context length.
        num_classes: classes of the whole stream; not used, the head grows as classes arrive.
        layer: factory of the layer in the slots, called with ``dim``.
        width: D.
        num_blocks: blocks of attention and feed-forward.
        num_heads: attention heads.
        ffn_hidden: inner width of the dense feed-forward layers; None for one linear map.
        slots: which blocks take ``layer``: see ``slot_blocks``.
        depth: Mixture-of-Depths, and
        attention_slots: projections made of experts: see ``Blocks``.
        vocabulary: tokens are 0 .. vocabulary - 1 (bytes: 256); 0 is padding, at a text's end only.
    """

    kind = "classification"

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        layer: LayerFactory,
        width: int = 64,
        num_blocks: int = 2,
        num_heads: int = 4,
        ffn_hidden: int | None = 256,
        slots: str = "middle",
        depth: Depth = None,
        attention_slots: str | Sequence[str] = "none",
        vocabulary: int = 256,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context_length(input_shape), width)
        self._add_blocks(
            layer, Blocks(width, num_blocks, num_heads, ffn_hidden, slots, depth, attention_slots)
        )
        self.head = Head(width)
        draw_tables(self.tokens, self.positions)

    def forward(
        self, inputs: Tensor, mask: Tensor | None = None, cohorts: Sequence[int] | None = None
    ) -> tuple[Tensor, dict[int, Routing]]:
        """Logits (B, C) of texts (B, S) of tokens, and the routings by block.

        Args:
            inputs: (B, S) int64.
            mask: (B, S) bool, False on padding; None: where the token is ``PADDING``.
            cohorts: let every expert layer use these cohorts only.
        """
        x_BSD = embed(inputs, self.tokens, self.positions)
        real_BS = inputs != PADDING if mask is None else mask
        needless = inputs.is_cpu and not torch.compiler.is_compiling() and bool(real_BS.all())
        # elsewhere the question would make every step wait for the device, or cut the graph
        out_BSD, routings = self._through_blocks(x_BSD, None if needless else real_BS, cohorts)
        return self.head(self._pool(out_BSD, real_BS)), routings

    @abstractmethod
    def _pool(self, x_BSD: Tensor, real_BS: Tensor) -> Tensor:
        """(B, D): a text as one vector."""


class EncoderClassifier(TextClassifier):
    """Every position sees the whole text; a text is the mean of its real positions."""

    causal = False

    def _pool(self, x_BSD: Tensor, real_BS: Tensor) -> Tensor:
        total_BD = x_BSD.masked_fill(~real_BS.unsqueeze(-1), 0.0).sum(dim=1)
        return total_BD / real_BS.sum(dim=1, keepdim=True).clamp_min(1)


class DecoderClassifier(TextClassifier):
    """A position sees its past, as in the language model; a text is its last real position (GPT, 2018)."""

    causal = True

    def _pool(self, x_BSD: Tensor, real_BS: Tensor) -> Tensor:
        last_B = (real_BS.sum(dim=1) - 1).clamp_min(0)
        return x_BSD[torch.arange(len(last_B), device=last_B.device), last_B]
