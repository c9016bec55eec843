"""Upcycling: the experts of a mixture start as copies of the dense layer that they replace.

Legend: T tokens, D width, H hidden width, I and O inputs and outputs of a linear map, n experts of a cohort.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cl_moe.errors import InputError
from cl_moe.layers.experts import Cohort
from cl_moe.layers.moe import MoE
from cl_moe.layers.routers import TopK
from cl_moe.layers.routing import ExpertLayer, noisy_copy

TOLERANCE = 1e-6
"""Of outputs in float64, relative to the largest: exact and tanh GELU are told apart."""


class LinearMap(NamedTuple):
    """``x @ weight + bias``.

    Args:
        weight: (I, O).
        bias: (O,), or None.
    """

    weight: Tensor
    bias: Tensor | None


def linear_maps(module: nn.Module) -> list[LinearMap]:
    """The linear maps inside a module, as registered: ``nn.Linear``, and the ``Conv1D`` of GPT-2's layers."""
    maps = []
    for part in module.modules():
        if isinstance(part, nn.Linear):
            maps.append(LinearMap(part.weight.detach().t(), _detached(part.bias)))
        elif type(part).__name__ == "Conv1D" and hasattr(part, "nf"):  # transformers': a transposed nn.Linear
            assert isinstance(part.weight, Tensor)
            maps.append(LinearMap(part.weight.detach(), _detached(part.bias)))
    return maps


@torch.no_grad()
def upcycle(layer: ExpertLayer, dense: nn.Module, exact: bool = True, noise: float = 0.0) -> None:
    """Make every expert a copy of a dense layer (Komatsuzaki et al., 2212.05055: all experts are copies).

    The router stays as it was initialised. Where the gates of every token sum to 1 and none is dropped, the
    layer then computes what the dense one did, to rounding; routing makes the copies differ as they learn.

    Args:
        layer: a ``MoE`` of the dense layer's width, hidden width and activation; changed in place.
        dense: two linear maps with the activation between them (``DenseFFN``, ``nn.Sequential``, the
            feed-forward layer of a foreign model); missing biases are zeros. Dropout is allowed; it is not
            copied.
        exact: refuse a layer that would not compute the same. False: the variant of the paper's language
            models, whose gates do not sum to 1 and may be dropped, so that the output jumps.
        noise: standard deviation of noise on the copies, relative to the copied tensor's own; >= 0.

    Raises:
        InputError: the layer has no such experts, the shapes differ, the dense layer computes something
            else, or, with ``exact``, the gates don't sum to 1.
    """
    if not isinstance(layer, MoE):
        raise InputError(
            got=f"upcycling into {type(layer).__name__}",
            allowed="MoE, whose experts are feed-forward layers",
            key="layer (or upcycle)",
        )
    if exact and not (isinstance(layer.router, TopK) and layer.router.normalize == "selected"):
        raise _refused_gates(type(layer.router).__name__)
    first, second = _two_maps(dense)
    cohorts: list[Cohort] = list(layer.cohorts)  # type: ignore[arg-type]
    for cohort in cohorts:
        _check_shapes(cohort, first, second)
    _check_formula(dense, cohorts[0])
    for cohort in cohorts:
        for name, source in (("in", first), ("out", second)):
            _fill(getattr(cohort, f"w_{name}"), source.weight, noise)
            _fill(getattr(cohort, f"b_{name}"), source.bias, noise)
    if exact and not noise and not _equal(*_answers(dense, layer)):
        raise _refused_gates(f"{type(layer.router).__name__}, or what stands beside it in the layer,")


def _two_maps(dense: nn.Module) -> tuple[LinearMap, LinearMap]:
    maps = linear_maps(dense)
    if len(maps) != 2:
        gated = " (a gated unit has three; experts here have two)" if len(maps) == 3 else ""
        raise InputError(
            got=f"upcycling of {type(dense).__name__} with {len(maps)} linear maps{gated}",
            allowed="two linear maps with an activation between them",
            key="upcycle",
        )
    return maps[0], maps[1]


def _check_shapes(cohort: Cohort, first: LinearMap, second: LinearMap) -> None:
    theirs, ours = (tuple(m.weight.shape) for m in (first, second)), (cohort.w_in, cohort.w_out)
    for (inputs, outputs), weight in zip(theirs, ours, strict=True):
        if (inputs, outputs) != tuple(weight.shape[1:]):
            raise InputError(
                got=f"experts of {weight.shape[1]} x {weight.shape[2]} for a map of {inputs} x {outputs}",
                allowed=f"hidden={first.weight.shape[1]} and dim={first.weight.shape[0]}, as the dense layer",
                key="layer.hidden",
            )
    for bias, source in ((cohort.b_in, first), (cohort.b_out, second)):
        if bias is None and source.bias is not None:
            raise InputError(
                got="upcycling of a layer with biases into experts without", allowed="true", key="layer.bias"
            )


def _check_formula(dense: nn.Module, cohort: Cohort) -> None:
    """Hold the dense layer against the experts' formula: no name of a class says what it computes."""
    first, second = _two_maps(_twin(dense))
    x_TD = _probe(first.weight.shape[0])
    hidden_TH = cohort.activation(_affine(x_TD, first))
    if not _equal(_tensor(_twin(dense)(x_TD)), _affine(hidden_TH, second)):
        raise InputError(
            got=f"upcycling of {type(dense).__name__}, which computes something else than the experts would",
            allowed="two linear maps with the experts' activation between them, applied as registered",
            key="layer.activation (or upcycle)",
        )


def _answers(dense: nn.Module, layer: MoE) -> tuple[Tensor, Tensor]:
    x_TD = _probe(layer.dim)
    return _tensor(_twin(dense)(x_TD)), _tensor(_twin(layer)(x_TD))


def _twin(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).to("cpu", torch.float64).eval()


def _probe(dim: int) -> Tensor:
    """(T, D) inputs of many sizes, so that activations show where they differ."""
    generator = torch.Generator().manual_seed(0)
    size_T1 = torch.logspace(-1, 2, 32, dtype=torch.float64).unsqueeze(-1)
    return size_T1 * torch.randn(32, dim, generator=generator, dtype=torch.float64)


def _equal(one: Tensor, other: Tensor) -> bool:
    same = one.shape == other.shape
    return same and bool((one - other).abs().max() <= TOLERANCE * one.abs().max())


def _affine(x: Tensor, linear: LinearMap) -> Tensor:
    out = x @ linear.weight
    return out if linear.bias is None else out + linear.bias


def _fill(stacked: Tensor | None, source: Tensor | None, noise: float) -> None:
    if stacked is None:
        return
    if source is None:
        stacked.zero_()
        return
    stacked.copy_(source.expand_as(stacked))
    if noise:
        stacked.copy_(noisy_copy(stacked, noise))


def _tensor(out: Tensor | tuple[Tensor, object]) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def _detached(bias: object) -> Tensor | None:
    return bias.detach() if isinstance(bias, Tensor) else None


def _refused_gates(name: str) -> InputError:
    return InputError(
        got=f"exact upcycling, and gates that do not sum to 1 for every token ({name})",
        allowed="TopK with normalize=selected and nothing beside the routed experts; or exact=false",
        key="router.normalize (or exact)",
    )
