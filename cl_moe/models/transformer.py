"""What the transformers share: pre-norm blocks of attention and a feed-forward slot, some of them at depth.

Legend: B batch, S positions, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cl_moe.errors import InputError
from cl_moe.layers.depth import DepthRouter
from cl_moe.layers.expert_layer import ExpertLayer
from cl_moe.layers.routing import Routing
from cl_moe.models.attention import PROJECTIONS, Mixer, attention_projections
from cl_moe.models.base import ContinualModel, active_parameters, depth_key
from cl_moe.models.slots import LayerFactory, fill_slots, slot_blocks

Depth = float | Mapping[str, Any] | None
_DEPTH = {"capacity": 0.125, "every": 2, "predictor_weight": 1.0}


@dataclass(frozen=True)
class Blocks:
    """How the blocks of a transformer are made; a model's parameters of the same names.

    Args:
        width: D.
        num_blocks: blocks of attention and feed-forward.
        num_heads: attention heads, a divisor of the width.
        ffn_hidden: inner width of the dense feed-forward layers; None for one linear map.
        slots: which blocks take the expert layer: see ``slot_blocks``.
        depth: Mixture-of-Depths (``DepthRouter``): None; a capacity in (0, 1]; or a mapping with ``capacity``
            (.125), ``every`` (2: blocks 1, 3, ...; 1: all) and ``predictor_weight`` (1.0).
        attention_slots: projections that are expert layers too, in the blocks that take the layer:
            ``"none"``, or some of ``query``, ``key``, ``value``, ``output``.
    """

    width: int
    num_blocks: int
    num_heads: int
    ffn_hidden: int | None
    slots: str
    depth: Depth = None
    attention_slots: str | Sequence[str] = "none"


def context_length(input_shape: Sequence[int]) -> int:
    """S of inputs (S,), the tokens of a text.

    Raises:
        InputError: other inputs.

    >>> context_length((128,))
    128
    """
    if len(input_shape) != 1:
        raise InputError(
            got=f"inputs of shape {tuple(input_shape)} for a model of texts",
            allowed="model=mlp or model=patch_transformer, which take images; or a stream of texts",
            key="model (or stream)",
        )
    return input_shape[0]


class TransformerBody(ContinualModel):
    """A model made of transformer blocks. What comes before and behind them is the subclass's."""

    causal: bool
    blocks: nn.ModuleList
    mixers: nn.ModuleList
    norms: nn.ModuleList
    norm: nn.RMSNorm
    depths: nn.ModuleDict

    def _add_blocks(self, layer: LayerFactory, how: Blocks) -> None:
        """Build the blocks; called once, by the constructor, after the embeddings are drawn."""
        chosen, total = slot_blocks(how.slots, how.num_blocks)
        added = chosen if how.slots == "added" else []
        projections = attention_projections(how.attention_slots)
        if projections and added:
            raise InputError(
                got=f"attention_slots={','.join(projections)} with slots=added",
                allowed="slots=all, every_other or middle: an added block has no attention",
                key="model.attention_slots (or model.slots)",
            )
        self.blocks = fill_slots(how.slots, how.num_blocks, how.width, layer, how.ffn_hidden, "gelu")
        # An added block is the layer alone: no attention of its own.
        self.mixers = nn.ModuleList(
            nn.Identity()
            if index in added
            else Mixer(how.width, how.num_heads, self.causal, projections if index in chosen else (), layer)
            for index in range(total)
        )
        self.norms = nn.ModuleList(nn.RMSNorm(how.width) for _ in range(total))
        self.norm = nn.RMSNorm(how.width)
        self.depths = depth_routers(how.depth, total, how.width, self.causal)
        if self.causal:
            self._refuse_noncausal()

    @property
    def feed_forward(self) -> Sequence[nn.Module]:
        """The layer of each block."""
        return list(self.blocks)

    @property
    def expert_layers(self) -> dict[int, ExpertLayer]:
        """By index: feed-forward layers by their block, then projections (``projection_key``)."""
        layers = super().expert_layers
        for name in PROJECTIONS:
            for block, mixer in enumerate(self.mixers):
                layer = mixer.expert(name) if isinstance(mixer, Mixer) else None
                if layer is not None and len(layer.cohorts) > 0:
                    layers[self.projection_key(block, name)] = layer
        return layers

    @property
    def depth_blocks(self) -> list[int]:
        """Blocks that let only some tokens through, in order."""
        return sorted(int(at) for at in self.depths)

    def active_parameters(self) -> int:
        """The same; of a block at depth the share that its capacity is, since the other tokens pass by."""
        active = super().active_parameters()
        for at, router in self.depths.items():
            parts = (self.blocks[int(at)], self.mixers[int(at)], self.norms[int(at)])
            assert isinstance(router, DepthRouter)
            active -= round((1 - router.capacity) * sum(active_parameters(part) for part in parts))
        return active

    def projection_key(self, block: int, projection: str) -> int:
        """Index of a projection made of experts: behind the blocks come their queries, then keys, ..."""
        return len(self.blocks) * (1 + PROJECTIONS.index(projection)) + block

    def _through_blocks(
        self, x_BSD: Tensor, mask: Tensor | None, cohorts: Sequence[int] | None
    ) -> tuple[Tensor, dict[int, Routing]]:
        """(B, S, D) behind the last norm; routings by index, those of depth by ``depth_key``."""
        routings: dict[int, Routing] = {}
        for index in range(len(self.blocks)):
            run = partial(self._block, index, cohorts)
            if str(index) in self.depths:
                x_BSD, chosen, held = self.depths[str(index)](x_BSD, mask, run)
                routings[depth_key(index)] = chosen
            else:
                x_BSD, held = run(x_BSD, mask)
            routings.update(held)
        return self.norm(x_BSD), routings

    def _block(
        self, index: int, cohorts: Sequence[int] | None, x_BSD: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, dict[int, Routing]]:
        routings = {}
        mixer = self.mixers[index]
        if isinstance(mixer, Mixer):
            x_BSD, held = mixer(x_BSD, mask, cohorts)
            for name, routing in held.items():
                if routing.num_experts:
                    routings[self.projection_key(index, name)] = routing
        out_BSD, routing = self.blocks[index](self.norms[index](x_BSD), mask=mask, cohorts=cohorts)
        if routing.num_experts:
            routings[index] = routing
        return x_BSD + out_BSD, routings

    def _refuse_noncausal(self) -> None:
        for layer in self.expert_layers.values():
            if not layer.causal:
                seer = type(getattr(layer, "router", layer)).__name__
                raise InputError(
                    got=f"{seer}, which looks ahead, in {type(self).__name__}, which is causal",
                    allowed="a router that does not look ahead (top_k by token, switch), or a model that may "
                    "(encoder, encoder_classifier, patch_transformer)",
                    key="router (or model)",
                )


def depth_routers(depth: Depth, num_blocks: int, width: int, causal: bool) -> nn.ModuleDict:
    """A router for every block that only some tokens go through, by the block's index.

    >>> list(depth_routers(0.5, 4, 8, True)), list(depth_routers({"every": 1}, 2, 8, True))
    (['1', '3'], ['0', '1'])
    """
    if depth is None:
        return nn.ModuleDict()
    given = dict(depth) if isinstance(depth, Mapping) else {"capacity": depth}
    if unknown := [name for name in given if name not in _DEPTH]:
        raise InputError(
            got=f"depth.{unknown[0]}", allowed=", ".join(_DEPTH), key=f"model.depth.{unknown[0]}"
        )
    options = _DEPTH | given
    every = options.pop("every")
    if not isinstance(every, int) or not 1 <= every <= num_blocks:
        raise InputError(
            got=f"depth.every={every!r}",
            allowed=f"1 .. {num_blocks}, the blocks there are",
            key="model.depth.every",
        )
    return nn.ModuleDict(
        {
            str(index): DepthRouter(width, causal=causal, **options)
            for index in range(every - 1, num_blocks, every)
        }
    )


def draw_tables(*tables: nn.Embedding) -> None:
    """Small embeddings: normal, standard deviation .02 (GPT-2)."""
    for table in tables:
        nn.init.normal_(table.weight, std=0.02)


def embed(inputs: Tensor, tokens: nn.Embedding, positions: nn.Embedding) -> Tensor:
    """(B, S, D): what stands at each position, plus where.

    Raises:
        InputError: the inputs are no tokens, or more than there are positions.
    """
    if inputs.dim() != 2 or inputs.is_floating_point():
        raise InputError(
            got=f"inputs of shape {tuple(inputs.shape)} and dtype {inputs.dtype}",
            allowed="tokens: whole numbers (B, S), as streams of text give them",
            key="stream (or model)",
        )
    length, context = inputs.shape[1], positions.num_embeddings
    if length > context:
        raise InputError(
            got=f"{length} tokens", allowed=f"at most {context}, the context", key="stream.context"
        )
    return tokens(inputs) + positions(torch.arange(length, device=inputs.device))
