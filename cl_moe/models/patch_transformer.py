"""An image classifier that reads an image as a sequence of patches (ViT, 2010.11929).

Legend: B batch, S patches, D width, C classes known so far, c channels, h x w patches, p side of a patch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from cl_moe.errors import InputError
from cl_moe.layers.routing import Routing
from cl_moe.models.base import Head
from cl_moe.models.slots import LayerFactory
from cl_moe.models.transformer import Blocks, Depth, TransformerBody, draw_tables


class PatchTransformer(TransformerBody):
    """Patches, each a token that sees all others; the mean of all patches; a growing head.

    The variant: learnt positions, pre-norm, and the mean instead of a class token.

    Args:
        input_shape: of an image: ``(c, height, width)``, ``(height, width)``, or flat: 64 is 8 x 8.
        num_classes: classes of the whole stream; not used, the head grows as classes arrive.
        layer: factory of the layer in the slots, called with ``dim``.
        width: D.
        num_blocks: blocks of attention and feed-forward.
        num_heads: attention heads.
        ffn_hidden: inner width of the dense feed-forward layers; None for one linear map.
        slots: which blocks take ``layer``: see ``slot_blocks``.
        depth: Mixture-of-Depths, and
        attention_slots: projections made of experts: see ``Blocks``.
        patch_size: p, a divisor of height and width.
    """

    kind = "classification"
    causal = False

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        layer: LayerFactory,
        width: int = 64,
        num_blocks: int = 2,
        num_heads: int = 4,
        ffn_hidden: int | None = 128,
        slots: str = "middle",
        depth: Depth = None,
        attention_slots: str | Sequence[str] = "none",
        patch_size: int = 2,
    ) -> None:
        super().__init__()
        self.image = image_shape(input_shape)
        channels, high, wide = self.image
        if patch_size < 1 or high % patch_size or wide % patch_size:
            raise InputError(
                got=f"patch_size={patch_size} for images of {high} x {wide}",
                allowed="a divisor of both sides",
                key="model.patch_size",
            )
        self.patch_size = patch_size
        self.stem = nn.Linear(channels * patch_size**2, width)
        self.positions = nn.Embedding((high // patch_size) * (wide // patch_size), width)
        self._add_blocks(
            layer, Blocks(width, num_blocks, num_heads, ffn_hidden, slots, depth, attention_slots)
        )
        self.head = Head(width)
        draw_tables(self.positions)

    def forward(
        self, inputs: Tensor, mask: Tensor | None = None, cohorts: Sequence[int] | None = None
    ) -> tuple[Tensor, dict[int, Routing]]:
        """Logits (B, C) of images (B, ...), and the routings by block."""
        x_BSD, routings = self.read(inputs, mask, cohorts)
        return self.head(x_BSD.mean(dim=1)), routings

    def read(
        self, inputs: Tensor, mask: Tensor | None = None, cohorts: Sequence[int] | None = None
    ) -> tuple[Tensor, dict[int, Routing]]:
        """(B, S, D) behind the last norm, whose mean the head reads; and the routings by block."""
        if not inputs.is_floating_point() or inputs.shape[1:].numel() != math.prod(self.image):
            raise InputError(
                got=f"inputs of shape {tuple(inputs.shape)} and dtype {inputs.dtype}",
                allowed=f"floating images of {math.prod(self.image)} values",
                key="stream (or model)",
            )
        x_BSD = self.stem(self.patches(inputs)) + self.positions.weight
        return self._through_blocks(x_BSD, mask, cohorts)

    @property
    def cuts(self) -> Sequence[nn.Module]:
        """The norm behind the last block."""
        return [self.norm]

    def patches(self, inputs: Tensor) -> Tensor:
        """(B, h w, c p p): the patches of images (B, ...), row by row."""
        side = self.patch_size
        image_Bchw = inputs.reshape(-1, *self.image)
        parts_Bchpwp = image_Bchw.unflatten(3, (-1, side)).unflatten(2, (-1, side))
        return parts_Bchpwp.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def image_shape(input_shape: Sequence[int]) -> tuple[int, int, int]:
    """Channels, height and width of an image of this shape.

    >>> image_shape((64,)), image_shape((28, 28)), image_shape((3, 32, 32))
    ((1, 8, 8), (1, 28, 28), (3, 32, 32))
    """
    shape = tuple(input_shape)
    if len(shape) == 1 and math.isqrt(shape[0]) ** 2 == shape[0]:
        return (1, math.isqrt(shape[0]), math.isqrt(shape[0]))
    if len(shape) == 2:
        return (1, *shape)
    if len(shape) == 3:
        return (shape[0], shape[1], shape[2])
    raise InputError(
        got=f"inputs of shape {shape}",
        allowed="images: (channels, height, width), (height, width), or a flat square",
        key="model (or stream)",
    )
