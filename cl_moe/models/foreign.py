"""Expert layers in a model that was not written for them, and the routings of its forward passes.

A foreign block calls its feed-forward layer as ``mlp(x)`` and takes a tensor back, so what was routed cannot
be returned through it (law 5). Here alone it leaves aside: each slot hands it to the block that collects.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import Tensor, nn

from cl_moe.errors import InputError
from cl_moe.layers.expert_layer import ExpertLayer
from cl_moe.layers.recomputing import recomputing
from cl_moe.layers.routing import Routing
from cl_moe.layers.upcycle import linear_maps
from cl_moe.layers.upcycle import upcycle as upcycle_layer


class Collected:
    """What the expert layers of a model routed while a ``collecting`` block was open.

    Attributes:
        routings: by name of the slot, in the order of its calls; one routing each after one forward pass.
        mask: (B, S) bool, False on padding, for every slot; None where there is none.
        cohorts: the cohorts that every slot uses; None for all.
    """

    def __init__(self, mask: Tensor | None = None, cohorts: Sequence[int] | None = None) -> None:
        self.mask, self.cohorts = mask, cohorts
        self.routings: dict[str, list[Routing]] = {}

    def losses(self) -> dict[str, Tensor]:
        """The auxiliary losses by name, already weighted, added up over slots and calls; scalars."""
        total: dict[str, Tensor] = {}
        for routing in (routing for routings in self.routings.values() for routing in routings):
            for name, value in routing.losses.items():
                total[name] = total[name] + value if name in total else value
        return total


class ExpertSlot(nn.Module):
    """An expert layer where a caller expects ``mlp(x) -> out``.

    A call inside a backward pass is activation checkpointing, which computes a part again: it is counted no
    second time, and needs the mask of the first.

    Args:
        layer: the expert layer.
        name: of the slot in its model.
    """

    def __init__(self, layer: ExpertLayer, name: str) -> None:
        super().__init__()
        self.layer, self.name = layer, name
        self.collected: Collected | None = None
        self.was_masked = False  # by the block that was closed last

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output, of the shape of ``x`` (..., D)."""
        collected = self.collected
        again = recomputing()
        if collected is None:
            if again and self.was_masked:
                raise RuntimeError(
                    "a checkpointed part with a padding mask is computed again after its collecting(...) "
                    "block was closed: call backward() inside the block"
                )
            return self.layer(x)[0]
        out, routing = self.layer(x, mask=_fitting(collected.mask, x), cohorts=collected.cohorts)
        if not again:
            collected.routings.setdefault(self.name, []).append(routing)
        return out


def put_experts(
    model: nn.Module,
    pattern: str,
    layer: Callable[..., ExpertLayer],
    dim: int | None = None,
    upcycle: bool = False,
    exact: bool = True,
    causal: bool = False,
) -> dict[str, ExpertLayer]:
    """Put expert layers into the places of a model's feed-forward layers; nothing is replaced on an error.

    The new layers have the dtype, the device and the mode of those that they replace. A module that stands in
    several places is replaced by one layer in all of them.

    Args:
        model: any module; changed in place.
        pattern: of module names, as in ``fnmatch``: ``"model.layers.*.mlp"``.
        layer: makes a layer when called with ``dim=``.
        dim: D; None: found from the linear maps of what is replaced.
        upcycle: experts start as copies of the layer that they replace: see ``layers.upcycle``.
        exact: of an upcycled model: refuse experts that would change what the model computes.
        causal: the model is a causal language model: refuse layers that look ahead.

    Returns:
        The new layers by the names of the slots, for growing and freezing.

    Raises:
        InputError: no module has such a name (the nearest names are listed), one match stands inside
            another, it holds experts already, the width cannot be found, upcycling cannot be, or a layer
            looks ahead in a causal model.
    """
    made: dict[int, ExpertSlot] = {}
    places = {name: old for name, old in model.named_modules(remove_duplicate=False) if name}
    matches = {name: old for name, old in places.items() if fnmatchcase(name, pattern)}
    _check_matches(matches, list(places), pattern)
    for name, old in matches.items():
        if id(old) not in made:
            new = _instead_of(old, name, layer, dim, model)
            if causal:
                _check_causal(new, type(model).__name__)
            if upcycle:
                upcycle_layer(new, old, exact=exact)
            made[id(old)] = ExpertSlot(new, name).train(old.training)
    for name, old in matches.items():
        model.set_submodule(name, made[id(old)])
    return {slot.name: slot.layer for slot in made.values()}


@contextmanager
def collecting(
    model: nn.Module, mask: Tensor | None = None, cohorts: Sequence[int] | None = None
) -> Iterator[Collected]:
    """Collect what the expert layers of a model route inside a ``with`` block, and tell them what to mask.

    Blocks may be nested: a pass belongs to the innermost. Activation checkpointing counts once; take its
    form without re-entry (``use_reentrant=False``), since the other computes no gradient of the routers'
    losses. With it and a mask, call ``backward`` inside the block.

    Args:
        model: in which ``put_experts`` put layers, itself or wrapped.
        mask: (B, S) bool, False on padding.
        cohorts: use these cohorts only; None for all.

    Raises:
        InputError: the model has no expert layers.
    """
    slots = [part for part in model.modules() if isinstance(part, ExpertSlot)]
    if not slots:
        raise InputError(
            got=f"collecting from {type(model).__name__}, which has no expert slots",
            allowed="a model in which put_experts(...) put layers",
            key="model",
        )
    collected = Collected(mask, cohorts)
    before = [slot.collected for slot in slots]
    try:
        for slot in slots:
            slot.collected = collected
        yield collected
    finally:
        for slot, outer in zip(slots, before, strict=True):
            slot.collected = outer
            slot.was_masked = mask is not None or cohorts is not None


def _check_matches(matches: dict[str, nn.Module], names: list[str], pattern: str) -> None:
    if not matches:
        # One line for the blocks 0 .. 31 of a model, so that the list shows what kinds of places there are.
        kinds = list(dict.fromkeys(re.sub(r"\b\d+\b", "*", name) for name in names))
        near = get_close_matches(re.sub(r"\b\d+\b", "*", pattern), kinds, n=5, cutoff=0.0)
        raise InputError(
            got=f"pattern={pattern}, which no module of the model is called",
            allowed="a pattern of its modules' names, such as " + (", ".join(near) or "... it has none"),
            key="pattern",
        )
    for name, old in matches.items():
        if any(_has_experts(part) for part in old.modules()):
            raise InputError(
                got=f"pattern={pattern}, which takes {name}, where experts stand already",
                allowed="places without experts: a second call would lose those of the first",
                key="pattern",
            )
        inside = next((other for other in matches if other.startswith(f"{name}.")), None)
        if inside is not None:
            raise InputError(
                got=f"pattern={pattern}, which takes {name} and also {inside} inside it",
                allowed="a pattern of modules that stand side by side",
                key="pattern",
            )


def _instead_of(
    old: nn.Module, name: str, layer: Callable[..., ExpertLayer], dim: int | None, model: nn.Module
) -> ExpertLayer:
    new = layer(dim=width_of(old, name) if dim is None else dim)
    if not isinstance(new, ExpertLayer):
        raise InputError(
            got=f"layer that makes a {type(new).__name__}", allowed="an ExpertLayer, such as MoE", key="layer"
        )
    like = [p for module in (old, model) for p in module.parameters() if p.is_floating_point()]
    return new.to(like[0]) if like else new


def _has_experts(part: nn.Module) -> bool:
    return isinstance(part, ExpertSlot) or (isinstance(part, ExpertLayer) and len(part.cohorts) > 0)


def _check_causal(layer: ExpertLayer, model: str) -> None:
    if layer.causal:
        return
    router = getattr(layer, "router", None)
    seer = type(layer).__name__ + (f" with {type(router).__name__}" if router is not None else "")
    raise InputError(
        got=f"{seer}, which sees later tokens, in {model}",
        allowed="a causal layer and router in a causal language model",
        key="router (or layer, or model)",
    )


def width_of(module: nn.Module, name: str) -> int:
    """D of a feed-forward layer: inputs of its first linear map, outputs of its last."""
    maps = linear_maps(module)
    widths = {maps[0].weight.shape[0], maps[-1].weight.shape[1]} if maps else set()
    if len(widths) != 1:
        raise InputError(
            got=f"{name} ({type(module).__name__}), whose linear maps lead from and to {sorted(widths)}",
            allowed="a module of equal input and output widths, or dim=...",
            key="dim",
        )
    return widths.pop()


def _fitting(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """The mask in the shape of a slot's tokens: some models flatten (B, S, D) before their experts."""
    flattened = mask is not None and x.dim() == 2 and mask.numel() == x.shape[0]
    return mask.reshape(-1) if mask is not None and flattened else mask
