"""Upcycling: the experts of a mixture start as copies of the dense layer that they replace.

Legend: T tokens, D width, H hidden width, I and O inputs and outputs of a linear map, n experts of a cohort.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import permutations
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cl_moe.errors import InputError
from cl_moe.layers.checks import number
from cl_moe.layers.expert_layer import ExpertLayer, noisy_copy
from cl_moe.layers.experts import Cohort
from cl_moe.layers.moe import MoE
from cl_moe.layers.routers import TopK

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


class Formula(NamedTuple):
    """What a feed-forward layer computes: ``(act(x first) * (x up)) second``.

    Args:
        first: D to H, under the activation.
        second: H to D.
        up: D to H, of a gated layer; None where there is no factor.
    """

    first: LinearMap
    second: LinearMap
    up: LinearMap | None = None

    def maps(self) -> dict[str, LinearMap]:
        """By the experts' names of them."""
        maps = {"in": self.first, "out": self.second}
        return maps if self.up is None else {**maps, "up": self.up}


@torch.no_grad()
def upcycle(
    layer: ExpertLayer,
    dense: nn.Module,
    exact: bool = True,
    noise: float = 0.0,
    allow_frozen: bool = False,
) -> None:
    """Make every expert a copy of a dense layer (Komatsuzaki et al., 2212.05055: all experts are copies).

    The router stays as it was initialised. Where the gates of every token sum to 1 and none is dropped, the
    layer then computes what the dense one did, to rounding; routing makes the copies differ as they learn.

    Args:
        layer: a ``MoE`` of the dense layer's width, hidden width and activation, gated if it is; changed in
            place.
        dense: two linear maps with the activation between them (``DenseFFN``, ``nn.Sequential``, the
            feed-forward layer of a foreign model), or a gated unit: three maps, or two of which the first
            holds the two halves (Llama's and Phi-3's feed-forward layers). Which of them the activation
            follows is found out by computing. Missing biases are zeros. Dropout is allowed; it is not copied.
        exact: refuse a layer that would not compute the same. False: the variant of the paper's language
            models, whose gates do not sum to 1 and may be dropped, so that the output jumps.
        noise: standard deviation of noise on the copies, relative to the copied tensor's own; >= 0.
        allow_frozen: fill frozen cohorts too: of a fresh layer that takes a frozen one's place.

    Raises:
        InputError: the layer has no such experts, or frozen ones, the shapes differ, the dense layer computes
            something else, or, with ``exact``, the gates don't sum to 1. The layer is then as it was.
    """
    if not isinstance(layer, MoE):
        raise InputError(
            got=f"upcycling into {type(layer).__name__}",
            allowed="MoE, whose experts are feed-forward layers",
            key="layer (or upcycle)",
        )
    if exact and not (isinstance(layer.router, TopK) and layer.router.normalize == "selected"):
        raise _refused_gates(type(layer.router).__name__)
    num_noops = layer.cohorts[0].num_noops
    if exact and num_noops:
        raise InputError(
            got=f"exact upcycling with {num_noops} no-op experts, which take a share of the gates",
            allowed="layer.num_noops=0, or exact=false",
            key="layer.num_noops (or exact)",
        )
    if layer.hidden is None:
        raise InputError(
            got="upcycling into experts of one linear map",
            allowed="experts with a hidden layer",
            key="layer.hidden (or upcycle)",
        )
    number("noise", noise, key="noise")
    if any(layer.frozen_cohorts) and not allow_frozen:
        raise InputError(
            got="upcycling into a layer with frozen experts, whose weights never change again",
            allowed="a layer of which nothing is frozen",
            key="layer",
        )
    formula = _formula_of(dense, layer.glu, list(layer.cohorts))  # type: ignore[arg-type]
    if exact and not noise:
        trial = copy.deepcopy(layer)
        _fill_all(trial, formula, noise)
        if not _equal(*_answers(dense, trial)):
            raise _refused_gates(f"{type(layer.router).__name__}, or what stands beside it in the layer,")
    _fill_all(layer, formula, noise)


@torch.no_grad()
def computes_the_same(layer: MoE, dense: nn.Module) -> bool:
    """Whether an upcycled layer computes, to rounding, what the dense layer does.

    That takes gates that sum to 1 for every token, none dropped, nothing beside the copies, and no noise.
    """
    exact = isinstance(layer.router, TopK) and layer.router.normalize == "selected"
    return exact and _equal(*_answers(dense, layer))


def _formula_of(dense: nn.Module, glu: bool, cohorts: list[Cohort]) -> Formula:
    """The dense layer's maps in their roles; an error where experts would compute something else.

    No name of a class or of a map says what it computes: every reading of it is held against its answers.
    """
    maps, twin = linear_maps(dense), _twin(dense)
    possible = list(zip(_readings(maps, glu), _readings(linear_maps(twin), glu), strict=True))
    if not possible:
        gated = (
            " (a gated unit has three; experts have them with layer.glu=true)"
            if len(maps) == 3 and not glu
            else ""
        )
        raise InputError(
            got=f"upcycling of {type(dense).__name__} with {len(maps)} linear maps{gated}",
            allowed="a gated unit" if glu else "two linear maps with an activation between them",
            key="layer.hidden of the dense run (or upcycle)" if len(maps) == 1 else "layer.glu (or upcycle)",
        )
    for cohort in cohorts:
        _check_shapes(cohort, possible[0][0])
    x_TD = _probe(cohorts[0].w_in.shape[1])
    if type(twin).forward in (nn.ModuleList.forward, nn.ModuleDict.forward):
        raise InputError(
            got=f"upcycling of {type(dense).__name__}, which computes nothing by itself",
            allowed="a module that maps (..., D) to (..., D), such as nn.Sequential",
            key="upcycle (or pattern)",
        )
    answer_TD = _tensor(twin(x_TD))
    for formula, wide_formula in possible:
        if _equal(answer_TD, _computed(wide_formula, cohorts[0], x_TD)):
            return formula
    raise InputError(
        got=f"upcycling of {type(dense).__name__}, which computes something else than the experts would",
        allowed="linear maps with the experts' activation between them, gated if layer.glu is true",
        key="layer.activation (or layer.glu, or upcycle)",
    )


def _readings(maps: list[LinearMap], glu: bool) -> Iterator[Formula]:
    """Every way to read linear maps as the experts' formula, those as registered first."""
    if not glu:
        if len(maps) == 2:
            yield Formula(*maps)
        return
    if len(maps) == 2 and maps[0].weight.shape[1] == 2 * maps[1].weight.shape[0]:
        weights, bias = maps[0].weight.chunk(2, dim=1), maps[0].bias
        biases = (None, None) if bias is None else bias.chunk(2)
        maps = [*map(LinearMap, weights, biases), maps[1]]
    if len(maps) == 3:
        for first, up, second in permutations(maps):
            if first.weight.shape == up.weight.shape == second.weight.t().shape:
                yield Formula(first, second, up)


def _check_shapes(cohort: Cohort, formula: Formula) -> None:
    for name, source in formula.maps().items():
        weight, bias = getattr(cohort, f"w_{name}"), getattr(cohort, f"b_{name}")
        if source.weight.shape != weight.shape[1:]:
            dim, hidden = formula.first.weight.shape
            got = "experts of {} x {} for a map of {} x {}".format(*weight.shape[1:], *source.weight.shape)
            raise InputError(
                got=got, allowed=f"hidden={hidden} and dim={dim}, as the dense layer", key="layer.hidden"
            )
        if bias is None and source.bias is not None:
            raise InputError(
                got="upcycling of a layer with biases into experts without", allowed="true", key="layer.bias"
            )


def _computed(formula: Formula, cohort: Cohort, x_TD: Tensor) -> Tensor:
    hidden_TH = cohort.activation(_affine(x_TD, formula.first))
    if formula.up is not None:
        hidden_TH = hidden_TH * _affine(x_TD, formula.up)
    return _affine(hidden_TH, formula.second)


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


def _fill_all(layer: MoE, formula: Formula, noise: float) -> None:
    for cohort in layer.cohorts:
        for name, source in formula.maps().items():
            _fill(getattr(cohort, f"w_{name}"), source.weight, noise)
            _fill(getattr(cohort, f"b_{name}"), source.bias, noise)


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
