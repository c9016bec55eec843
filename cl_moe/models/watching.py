"""What passes through a model in evaluation: the head's input, and how active hidden units are.

The models and layers keep nothing: forward hooks take it from outside, while somebody watches.

Legend: B batch, S positions, D width, U hidden units of a slot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cl_moe.layers.activity import Activity, of_units
from cl_moe.layers.expert_layer import ExpertLayer
from cl_moe.models.base import ContinualModel

POSITIONS = 4
"""Tokens of one example whose representations are kept, evenly spread, where the head reads every token."""


@dataclass
class Seen:
    """What was seen so far.

    Args:
        representations: of each batch (rows, D) float64 on the CPU, what the head read: one row per example,
            or of a language model those of ``POSITIONS`` of its positions, without padding.
        activity: of the hidden units of each slot, by its index; slots without hidden units are left out.
    """

    representations: list[Tensor] = field(default_factory=list)
    activity: dict[int, Activity] = field(default_factory=dict)

    def add(self, index: int, more: Activity | None) -> None:
        """Units of a slot in one batch."""
        if more is not None:
            known = self.activity.get(index)
            self.activity[index] = more if known is None else known.plus(more)


@contextmanager
def watching(
    model: ContinualModel,
    seen: Seen | None,
    apart: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Iterator[None]:
    """Watch a model that is used inside the block, in evaluation and with all cohorts.

    Inside, hooks keep what passes by; what it comes to is computed when the block ends, so that the pass
    itself costs what it costs unwatched.

    Args:
        model: to watch.
        seen: takes up what is seen; None: nothing is watched.
        apart: around what is computed at the end.
    """
    if seen is None:
        yield
        return
    mask, passed = list[Tensor | None](), list[Callable[[], None]]()

    def begins(module: nn.Module, args: tuple[Any, ...], options: Mapping[str, Any]) -> None:
        mask[:] = [options.get("mask")]

    def head_reads(module: nn.Module, args: tuple[Tensor]) -> None:
        passed.append(partial(_head, seen, args[0], mask[0] if mask else None))

    def slot(index: int, *passing: Any) -> None:
        passed.append(partial(_slot, seen, index, *passing))

    with ExitStack() as stack:
        for handle in (
            model.register_forward_pre_hook(begins, with_kwargs=True),
            model.head.register_forward_pre_hook(head_reads),
            *(layer.register_forward_hook(partial(slot, index)) for index, layer in watched(model).items()),
        ):
            stack.callback(handle.remove)
        yield
    with apart():
        for take in passed:
            take()


def watched(model: ContinualModel) -> dict[int, nn.Module]:
    """Where hidden units stand, by index of the slot: in its layer, or behind a single map."""
    slots = dict(enumerate(model.feed_forward)) | dict(model.expert_layers)
    found: dict[int, nn.Module] = {}
    for index, layer in slots.items():
        if isinstance(layer, ExpertLayer) and layer.has_hidden_units:
            found[index] = layer
        elif index in model.units_behind and not getattr(layer, "cohorts", ()):
            found[index] = model.units_behind[index]
    return found


def _head(seen: Seen, x: Tensor, mask: Tensor | None) -> None:
    seen.representations.append(_rows(x.detach(), mask))


def _slot(seen: Seen, index: int, module: nn.Module, args: tuple[Tensor, ...], out: Any) -> None:
    if isinstance(module, ExpertLayer):
        seen.add(index, module.hidden_activity(args[0].detach(), out[1]))
    else:
        seen.add(index, of_units(out.detach()))


def _rows(x: Tensor, mask: Tensor | None) -> Tensor:
    """(rows, D) of the head's input (B, D) or (B, S, D)."""
    if x.ndim == 3:
        position = torch.arange(0, x.shape[1], -(-x.shape[1] // POSITIONS) or 1, device=x.device)
        x = x.index_select(1, position)
        keep = None if mask is None else mask.index_select(1, position)
        x = x.flatten(0, 1) if keep is None else x[keep]
    return x.double().cpu()
