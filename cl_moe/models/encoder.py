"""A small encoder that fills in what was hidden from it: a masked language model, bidirectional, pre-norm.

Legend: B batch, S positions, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from cl_moe.layers.routing import Routing
from cl_moe.models.base import Head
from cl_moe.models.slots import LayerFactory
from cl_moe.models.spans import SpanMasking
from cl_moe.models.transformer import Blocks, Depth, TransformerBody, context_length, draw_tables, embed
from cl_moe.stream import IGNORE


class EncoderLM(TransformerBody):
    """Learns text by filling in hidden spans, so that routers which look ahead have a home.

    The variant: spans as T5 and the Switch Transformer draw them (``SpanMasking``), each hidden token
    replaced by a mask token and predicted in its place, as in BERT (1810.04805); there is no decoder that
    writes the spans out. The loss is over hidden tokens only, in nats per hidden token. Others are hidden in
    every step of training, always the same ones in evaluation (for one ``trainer.eval_batch_size``).

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
        mask_share: share of the tokens that is hidden, in (0, 1).
        span_length: mean length of a hidden span, >= 1.
    """

    kind = "language"
    causal = False

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
        mask_share: float = 0.15,
        span_length: float = 3.0,
    ) -> None:
        super().__init__()
        self.masking = SpanMasking(mask_share, span_length)
        self.mask_token = num_classes  # the one behind the vocabulary
        self.tokens = nn.Embedding(num_classes + 1, width)
        self.positions = nn.Embedding(context_length(input_shape), width)
        self._add_blocks(
            layer, Blocks(width, num_blocks, num_heads, ffn_hidden, slots, depth, attention_slots)
        )
        self.head = Head(width)
        self.head.grow(range(num_classes))
        draw_tables(self.tokens, self.positions)

    def pose(
        self, inputs: Tensor, targets: Tensor, draw: Callable[[], torch.Generator]
    ) -> tuple[Tensor, Tensor]:
        """Inputs with spans hidden, and what stood there; ``IGNORE`` everywhere else.

        Args:
            inputs: (B, S) int64 tokens; real ones first.
            targets: (B, S) int64, ``IGNORE`` on padding; what they are otherwise does not matter here.
            draw: gives the generator that the spans are drawn from.
        """
        length_B = (targets != IGNORE).sum(dim=1).cpu()
        hidden_BS = self.masking(length_B, inputs.shape[1], draw()).to(inputs.device)
        return inputs.masked_fill(hidden_BS, self.mask_token), inputs.masked_fill(~hidden_BS, IGNORE)

    def forward(
        self, inputs: Tensor, mask: Tensor | None = None, cohorts: Sequence[int] | None = None
    ) -> tuple[Tensor, dict[int, Routing]]:
        """Logits (B, S, V) of tokens (B, S), hidden ones being ``mask_token``, and the routings by block."""
        x_BSD = embed(inputs, self.tokens, self.positions)
        out_BSD, routings = self._through_blocks(x_BSD, mask, cohorts)
        return self.head(out_BSD), routings
