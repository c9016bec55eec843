"""Continual backpropagation (Dohare et al. 2024, "Loss of plasticity", Nature 632).

Legend: U hidden units between two maps, B rows of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cl_moe.errors import InputError
from cl_moe.layers.dense import DenseFFN
from cl_moe.models.base import ContinualModel, Head
from cl_moe.models.mlp import MLPClassifier
from cl_moe.seeds import derive_seed
from cl_moe.strategies.base import Batch, Outlook, Setting, Strategy, tensor_bytes
from cl_moe.strategies.teacher import check_weight


class Units(NamedTuple):
    """Hidden units: the maps whose rows they are, and the one that reads them."""

    made_by: tuple[nn.Linear, ...]
    read_by: nn.Linear | Head


class ContinualBackprop(Strategy):
    """Goes on replacing the least useful hidden units by fresh ones, so that the network can go on learning.

    After each step every unit of a hidden layer gets older, and its utility becomes ``decay * utility + (1 -
    decay) * mean |h| * sum |w_out|`` (algorithm 1; the mean over the batch, w_out the weights that read it).
    A share ``rate`` of the units older than ``maturity`` steps is replaced, the least useful first: weights
    into a unit are drawn anew, those out of it become 0, so that the network computes nearly what it did.
    Shares of a unit add up over steps. Units are those of dense layers: between the maps of the network
    (``model=mlp``), and inside feed-forward layers with two maps. The optimizer forgets what it remembered of
    a replaced unit's weights, in and out, as in the authors' code.

    Args:
        rate: rho, share of the mature units that is replaced per step, in [0, 1].
        maturity: m, steps for which a unit is left alone, >= 0.
        decay: eta, in [0, 1).
    """

    def __init__(self, rate: float = 1e-4, maturity: int = 100, decay: float = 0.99) -> None:
        check_weight(rate, "strategy.continual_backprop.rate")
        check_weight(decay, "strategy.continual_backprop.decay")
        for name, value, bad in (("rate", rate, rate > 1), ("decay", decay, decay >= 1)):
            if bad:
                key = f"strategy.continual_backprop.{name}"
                raise InputError(got=f"{name}={value}", allowed="a share below 1", key=key)
        if not isinstance(maturity, int) or maturity < 0:
            key = "strategy.continual_backprop.maturity"
            raise InputError(got=f"maturity={maturity!r}", allowed="a whole number, at least 0", key=key)
        self.replacement, self.maturity, self.decay = rate, maturity, decay
        self.utility: dict[str, Tensor] = {}  # (U,) by the name of the reading map
        self.age: dict[str, Tensor] = {}  # (U,) int64, steps
        self.credit: dict[str, float] = {}  # units that are due
        self._units: dict[str, Units] = {}
        self._active: dict[str, Tensor] = {}  # (U,) mean |h| of the step under way
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._due, self._draw = False, torch.Generator()
        self._forget: Callable[[Tensor, Any], None] = lambda parameter, part: None

    def check(self, setting: Setting) -> None:
        """There are units whose maps in and out are known."""
        if not hidden_units(setting.model):
            raise InputError(
                got=f"strategy=continual_backprop with {type(setting.model).__name__} and its layers",
                allowed="layer=dense: its units are those of dense layers",
                key="layer (or model, or strategy)",
            )

    def begin(self, outlook: Outlook) -> None:
        """Watch what is read while the model learns; a layer that grew or froze is looked at anew."""
        self._draw.manual_seed(derive_seed(outlook.seed, outlook.experience.index, "continual_backprop"))
        self._forget = outlook.forget
        self._units, self._active = hidden_units(outlook.model), {}
        for name, units in self._units.items():
            weight = units.made_by[0].weight
            known = len(self.age.get(name, ())) == len(weight)
            if not known:
                self.utility[name] = torch.zeros(len(weight))
                self.age[name], self.credit[name] = torch.zeros(len(weight), dtype=torch.int64), 0.0
            self._hooks.append(units.read_by.register_forward_pre_hook(self._note(name)))

    def _note(self, name: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
        def note(reader: nn.Module, inputs: tuple[Tensor]) -> None:
            if reader.training and name not in self._active:  # not a teacher's pass, nor a memory's
                self._active[name] = inputs[0].detach().abs().flatten(0, -2).float().mean(dim=0).cpu()

        return note

    def batch(self, inputs: Tensor, targets: Tensor) -> Batch:
        """The batch as it is; units that the last step made due are replaced first."""
        self._replace()
        self._active = {}
        return inputs, targets

    @torch.no_grad()
    def gradients(self, model: ContinualModel) -> None:
        """A step is made: utilities move, units get older."""
        for name, active_U in self._active.items():
            out_U = _weights_out(self._units[name].read_by).abs().sum(dim=0).cpu()
            self.utility[name] = self.decay * self.utility[name] + (1 - self.decay) * active_U * out_U
            self.age[name] = self.age[name] + 1
        self._due = True

    @torch.no_grad()
    def _replace(self) -> None:
        if not self._due:
            return
        self._due = False
        for name, units in self._units.items():
            mature_U = self.age[name] > self.maturity
            self.credit[name] += self.replacement * int(mature_U.sum())
            count = min(int(self.credit[name]), int(mature_U.sum()))
            self.credit[name] -= count
            worst_U = self.utility[name].masked_fill(~mature_U, math.inf).sort(stable=True).indices
            for unit in worst_U[:count].tolist():
                self._renew(units, unit)
                self.utility[name][unit], self.age[name][unit] = 0.0, 0

    def _renew(self, units: Units, unit: int) -> None:
        """Draw the weights into a unit as ``nn.Linear`` does; nothing reads it yet."""
        for rows in units.made_by:
            bound = 1 / math.sqrt(rows.in_features)
            drawn = torch.rand(rows.in_features + 1, generator=self._draw) * 2 * bound - bound
            rows.weight[unit] = drawn[:-1].to(rows.weight)
            self._forget(rows.weight, unit)
            if rows.bias is not None:
                rows.bias[unit] = drawn[-1].to(rows.bias)
                self._forget(rows.bias, unit)
        for part in units.read_by.cohorts if isinstance(units.read_by, Head) else [units.read_by]:
            part.weight[:, unit] = 0.0  # type: ignore[operator]
            self._forget(part.weight, (slice(None), unit))  # type: ignore[arg-type]

    def end(self, outlook: Outlook) -> None:
        """What the last step made due; nobody watches any more."""
        self._replace()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def state_dict(self) -> dict[str, Any]:
        """Utilities, ages, what is due, the draw."""
        own = {"utility": self.utility, "age": self.age, "credit": self.credit, "due": self._due}
        own = {name: dict(value) if isinstance(value, dict) else value for name, value in own.items()}
        return {**own, "draw": self._draw.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back; what is written to is copied."""
        self.utility = {name: value.clone() for name, value in state["utility"].items()}
        self.age = {name: value.clone() for name, value in state["age"].items()}
        self.credit, self._due = dict(state["credit"]), state["due"]
        self._draw.set_state(state["draw"])

    @property
    def buffer_bytes(self) -> int:
        """Bytes of utilities and ages."""
        return tensor_bytes(*self.utility.values(), *self.age.values())


def hidden_units(model: ContinualModel) -> dict[str, Units]:
    """Units of which every weight in and out is a dense layer's and learns, by name of the reading map."""
    names = {part: name for name, part in model.named_modules()}
    found: list[Units] = []
    for part in model.modules():
        if isinstance(part, DenseFFN) and part.linear_out is not None:
            found.append(Units(_first(part), part.linear_out))
    slots = [part for part in model.feed_forward if isinstance(part, DenseFFN)]
    if isinstance(model, MLPClassifier) and len(slots) == len(model.blocks) and not model.residual:
        before: nn.Linear = model.stem
        for slot in slots:
            if slot.linear_up is None:  # else two maps read them
                found.append(Units((before,), slot.linear_in))
            before = slot.linear_in if slot.linear_out is None else slot.linear_out
        found.append(Units((before,), model.head))
    return {names[units.read_by]: units for units in found if _learns(units)}


def _first(part: DenseFFN) -> tuple[nn.Linear, ...]:
    return (part.linear_in,) if part.linear_up is None else (part.linear_in, part.linear_up)


def _learns(units: Units) -> bool:
    maps = (*units.made_by, units.read_by)
    return all(p.requires_grad for part in maps for p in part.parameters())


def _weights_out(reader: nn.Linear | Head) -> Tensor:
    """(rows, U)."""
    if isinstance(reader, Head):
        return torch.cat([part.weight for part in reader.cohorts])  # type: ignore[misc]
    return reader.weight
