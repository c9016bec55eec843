"""Self-attention whose projections may be expert layers, and the half of a block that it makes.

Legend: B batch, S positions, D width, H heads, d width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast, get_args

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from cl_moe.errors import InputError
from cl_moe.layers.dense import DenseFFN
from cl_moe.layers.expert_layer import ExpertLayer
from cl_moe.layers.routing import Routing
from cl_moe.models.slots import LayerFactory

Projection = Literal["query", "key", "value", "output"]
PROJECTIONS: tuple[str, ...] = get_args(Projection)


def attention_projections(attention_slots: str | Sequence[str]) -> tuple[str, ...]:
    """The projections that ``model.attention_slots`` names, in the order of ``PROJECTIONS``.

    >>> attention_projections("none"), attention_projections(["value", "query"])
    ((), ('query', 'value'))
    """
    names = [attention_slots] if isinstance(attention_slots, str) else list(attention_slots)
    names = [] if names == ["none"] else names
    if any(name not in PROJECTIONS for name in names) or len(set(names)) < len(names):
        raise InputError(
            got=f"attention_slots={attention_slots!r}",
            allowed=f"none, or some of {', '.join(PROJECTIONS)}, each once",
            key="model.attention_slots",
        )
    return tuple(name for name in PROJECTIONS if name in names)


class Attention(nn.Module):
    """Multi-head self-attention, over the past or over all of the sequence.

    Args:
        width: D.
        num_heads: H, a divisor of the width.
        causal: whether a position sees itself and its past only.
        experts: an expert layer for each projection that is not to be a linear map (2101.03961, appendix A,
            puts them into queries, keys and values), by its name in ``PROJECTIONS``.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        causal: bool = True,
        experts: dict[str, ExpertLayer] | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or width % num_heads:
            raise InputError(
                got=f"num_heads={num_heads} for width={width}",
                allowed="a divisor of the width",
                key="model.num_heads",
            )
        self.num_heads, self.head_width, self.causal = num_heads, width // num_heads, causal
        experts = experts or {}
        self.fused = [name for name in PROJECTIONS[:3] if name not in experts]
        self.qkv = nn.Linear(width, len(self.fused) * width, bias=False) if self.fused else None
        self.out = nn.Linear(width, width, bias=False) if "output" not in experts else None
        self.experts = nn.ModuleDict(experts)

    def forward(
        self, x_BSD: Tensor, mask: Tensor | None = None, cohorts: Sequence[int] | None = None
    ) -> tuple[Tensor, dict[str, Routing]]:
        """(B, S, D) to (B, S, D), and what projections made of experts routed, by name.

        Args:
            x_BSD: (B, S, D).
            mask: (B, S) bool, False on padding, which nobody sees; in causal attention it stands at the end.
            cohorts: let expert layers use these cohorts only.
        """
        batch, length, _ = x_BSD.shape
        split = (self.num_heads, self.head_width)
        routings: dict[str, Routing] = {}
        parts = {}
        if self.qkv is not None:
            heads = self.qkv(x_BSD).view(batch, length, len(self.fused), *split)
            parts = dict(zip(self.fused, heads.permute(2, 0, 3, 1, 4).unbind(0), strict=True))
        for name in PROJECTIONS[:3]:
            if name in self.experts:
                out_BSD, routings[name] = self.experts[name](x_BSD, mask=mask, cohorts=cohorts)
                parts[name] = out_BSD.view(batch, length, *split).transpose(1, 2)
        visible = None if self.causal else _visible(mask)
        mixed_BHSd = F.scaled_dot_product_attention(
            parts["query"], parts["key"], parts["value"], attn_mask=visible, is_causal=self.causal
        )
        mixed_BSD = mixed_BHSd.transpose(1, 2).flatten(2)
        if self.out is not None:
            return self.out(mixed_BSD), routings
        out_BSD, routings["output"] = self.experts["output"](mixed_BSD, mask=mask, cohorts=cohorts)
        return out_BSD, routings


class Mixer(nn.Module):
    """What a block does before its feed-forward slot: attention, with its norm, added to the stream."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        causal: bool = True,
        projections: Sequence[str] = (),
        layer: LayerFactory | None = None,
    ) -> None:
        super().__init__()
        made = {name: layer(dim=width) for name in projections} if layer is not None else {}
        # with layer=dense a projection stays what it is elsewhere: one linear map, not a feed-forward layer
        experts = {name: one for name, one in made.items() if not isinstance(one, DenseFFN)}
        self.norm = nn.RMSNorm(width)
        self.attention = Attention(width, num_heads, causal, experts)

    def expert(self, projection: str) -> ExpertLayer | None:
        """The expert layer that makes a projection, if one does."""
        experts = self.attention.experts
        return cast(ExpertLayer, experts[projection]) if projection in experts else None

    def forward(
        self, x_BSD: Tensor, mask: Tensor | None = None, cohorts: Sequence[int] | None = None
    ) -> tuple[Tensor, dict[str, Routing]]:
        """(B, S, D) to (B, S, D), and the attention's routings."""
        out_BSD, routings = self.attention(self.norm(x_BSD), mask, cohorts)
        return x_BSD + out_BSD, routings


def _visible(mask_BS: Tensor | None) -> Tensor | None:
    """(B, 1, S, S) bool: all see the real positions, and padding itself: a softmax over nothing is NaN."""
    if mask_BS is None:
        return None
    itself_SS = torch.eye(mask_BS.shape[1], dtype=torch.bool, device=mask_BS.device)
    return mask_BS[:, None, None, :] | itself_SS
