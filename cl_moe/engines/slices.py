"""Tensor parallelism: several ranks compute one layer for the same tokens, each with a slice of its units.

The inner maps of feed-forward layers, experts and attention are cut by columns (hidden units, heads), the
outer ones by rows, so that a layer's output is the sum of what its ranks compute (Megatron-LM, 1909.08053,
section 3): one sum of activations forward, one of gradients backward. Experts keep their rows of the router,
so that all ranks choose alike; what is not cut is the same on all ranks, and learns the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cl_moe.layers.dense import DenseFFN
from cl_moe.layers.experts import Cohort
from cl_moe.layers.shared_experts import SharedExperts
from cl_moe.models.attention import Attention


class Cut(NamedTuple):
    """How a parameter is cut: along a dimension, in which so many parts stand one behind the other."""

    dim: int
    parts: int = 1

    def slice(self, value: Tensor, rank: int, size: int) -> Tensor:
        """What the rank-th of so many ranks holds, a copy.

        >>> Cut(0, parts=2).slice(torch.arange(8), 0, 2)
        tensor([0, 1, 4, 5])
        """
        parts = value.unflatten(self.dim, (self.parts, -1)).chunk(size, self.dim + 1)
        return parts[rank].flatten(self.dim, self.dim + 1).clone()

    def whole(self, slices: list[Tensor]) -> Tensor:
        """The inverse.

        >>> Cut(0, parts=2).whole([torch.tensor([0, 1, 4, 5]), torch.tensor([2, 3, 6, 7])])
        tensor([0, 1, 2, 3, 4, 5, 6, 7])
        """
        parts = [one.unflatten(self.dim, (self.parts, -1)) for one in slices]
        return torch.cat(parts, self.dim + 1).flatten(self.dim, self.dim + 1)


class Plan(NamedTuple):
    """What is cut in a module, and which biases are added once, by the parameters' names in it."""

    cuts: dict[str, Cut]
    biases: tuple[str, ...] = ()


def plan_of(module: nn.Module, size: int) -> Plan | None:
    """How a module is computed by so many ranks; None: by each of them as a whole."""
    if isinstance(module, Cohort):
        if module.hidden is None or module.hidden % size:
            return None
        cuts = {"w_in": Cut(2), "b_in": Cut(1), "w_up": Cut(2), "b_up": Cut(1), "w_out": Cut(1)}
        return _there(module, cuts, "b_out")
    if isinstance(module, SharedExperts):
        if module.w_in.shape[1] % size:
            return None
        cuts = {"w_in": Cut(1), "b_in": Cut(0), "w_up": Cut(1), "b_up": Cut(0), "w_out": Cut(0)}
        return _there(module, cuts, "b_out")
    if isinstance(module, DenseFFN):
        if module.linear_out is None or module.linear_out.in_features % size:
            return None
        inner = {f"linear_{name}.{part}": Cut(0) for name in ("in", "up") for part in ("weight", "bias")}
        return _there(module, inner | {"linear_out.weight": Cut(1)}, "linear_out.bias")
    if isinstance(module, Attention):
        if len(module.experts) or module.num_heads % size:
            return None
        return Plan({"qkv.weight": Cut(0, len(module.fused)), "out.weight": Cut(1)})
    return None


def _there(module: nn.Module, cuts: dict[str, Cut], bias: str) -> Plan:
    held = dict(module.named_parameters())
    return Plan({name: cut for name, cut in cuts.items() if name in held}, (bias,) if bias in held else ())


class Sliced:
    """A model whose layers are cut among the ranks of a group.

    Args:
        model: whole; cut in place.
        group: of the ranks that share the model.
    """

    def __init__(self, model: nn.Module, group: dist.ProcessGroup) -> None:
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        self.cuts: dict[str, Cut] = {}
        self.shapes: dict[str, torch.Size] = {}
        for prefix, module in list(model.named_modules()):
            if (plan := plan_of(module, self.size)) is not None:
                self._cut(f"{prefix}." if prefix else "", module, plan)

    def _cut(self, prefix: str, module: nn.Module, plan: Plan) -> None:
        for name, cut in plan.cuts.items():
            owner, last = _owner(module, name)
            value = owner._parameters[last]
            assert value is not None
            self.cuts[prefix + name], self.shapes[prefix + name] = cut, value.shape
            piece = cut.slice(value.detach(), self.rank, self.size)
            owner._parameters[last] = nn.Parameter(piece, value.requires_grad)
        biases, held = [_owner(module, name) for name in plan.biases], list[nn.Parameter | None]()
        group, size = self.group, self.size

        def enter(module: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            held[:] = [owner._parameters[last] for owner, last in biases]
            for (owner, last), bias in zip(biases, held, strict=True):
                owner._parameters[last] = _Share.apply(bias, size)
            if isinstance(module, Attention):
                module.num_heads //= size
            return (_Enter.apply(arguments[0], group), *arguments[1:])

        def leave(module: Any, arguments: Any, out: Any) -> Any:
            for (owner, last), bias in zip(biases, held, strict=True):
                owner._parameters[last] = bias
            if isinstance(module, Attention):
                module.num_heads *= size
            if isinstance(out, Tensor):
                return _Leave.apply(out, group)
            return (_Leave.apply(out[0], group), *out[1:])

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)

    def whole(self, name: str, value: Any) -> Any:
        """Slices of a parameter, or of what belongs to each of its numbers, put together on every rank."""
        cut = self.cuts.get(name)
        if cut is None or not isinstance(value, Tensor) or value.dim() != len(self.shapes[name]):
            return value
        slices = [torch.empty_like(value, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(slices, value.contiguous(), group=self.group)
        return cut.whole(slices)

    def slices(self, name: str, state: Mapping[str, Any]) -> dict[str, Any]:
        """This rank's slices of what is remembered of a parameter."""
        cut = self.cuts.get(name)
        return {
            key: value
            if cut is None or not isinstance(value, Tensor) or value.shape != self.shapes[name]
            else cut.slice(value, self.rank, self.size)
            for key, value in state.items()
        }


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    place, _, last = name.rpartition(".")
    return module.get_submodule(place), last


class _Enter(torch.autograd.Function):
    """The same tokens go into every slice: their gradients add up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _Leave(torch.autograd.Function):
    """The output is the sum over slices: each has its whole gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Share(torch.autograd.Function):
    """A bias that every slice adds its share of, and that learns as if one had added it."""

    @staticmethod
    def forward(ctx: Any, bias: Tensor, size: int) -> Tensor:
        return bias / size

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
