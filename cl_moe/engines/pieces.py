"""A model that lies in pieces on the ranks while it trains, and is whole on every rank between fits.

Growth, freezing, evaluations, strategies at an experience's start and end, and checkpoints see the whole
model only: an engine takes it to pieces as training starts, and puts it together again as it ends.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import lightning as L  # noqa: N812
import torch
from torch import Tensor, nn
from torch.distributed._composable_state import _module_state_mapping

from cl_moe.memory import optimizer_bytes
from cl_moe.optim import OptimizerState, clip_gradients, state_by_name

Named = Iterable[tuple[str, nn.Parameter]]


class Parted(Protocol):
    """A model in pieces that knows how it was."""

    def again(self, values: Mapping[str, Tensor]) -> None:
        """Everything as it was, with these parameters and buffers, by name."""


class InPieces(ABC):
    """Lightning's part of an engine that takes models to pieces.

    Every rank must call these functions equally often and in the same order.
    """

    together: Parted | None = None
    """The model as it was, as long as it lies in pieces."""
    remembered: int | None = None
    """Bytes that the last fit's optimizer remembered, of all ranks, where it is gone with the pieces."""

    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """The model's state by name, whole."""

    @abstractmethod
    def memory(self, parameters: Named) -> OptimizerState:
        """What the optimizer remembers, by name, whole."""

    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float) -> None:
        """Scale the gradients of all ranks so that their norm together is at most this."""
        clip_gradients(parameters, max_norm)

    def gather(self) -> None:
        """Put the model together again."""
        if self.together is not None:
            self.together.again(self.weights())
            self.together = None


def gather(trainer: L.Trainer) -> None:
    """Put the model that is trained together, if it lies in pieces."""
    if isinstance(trainer.strategy, InPieces):
        trainer.strategy.gather()


def clip(trainer: L.Trainer, parameters: Iterable[nn.Parameter], max_norm: float) -> None:
    """Scale gradients so that the norm of all of them is at most this."""
    if isinstance(trainer.strategy, InPieces):
        trainer.strategy.clip(parameters, max_norm)
    else:
        clip_gradients(parameters, max_norm)


def weights(trainer: L.Trainer, model: nn.Module) -> dict[str, Any]:
    """A model's state, whole."""
    held = trainer.strategy
    return held.weights() if isinstance(held, InPieces) and held.together else model.state_dict()


def optimizer_state(trainer: L.Trainer, parameters: Named) -> OptimizerState:
    """What the optimizer remembers, by name, whole."""
    held = trainer.strategy
    if isinstance(held, InPieces) and held.together:
        return held.memory(parameters)
    return state_by_name(trainer.optimizers[0], parameters)


def bytes_remembered(trainer: L.Trainer) -> int:
    """Bytes of what the optimizer of the last fit remembered: momentum, second moments."""
    held = trainer.strategy
    known = held.remembered if isinstance(held, InPieces) else None
    return optimizer_bytes(trainer.optimizers) if known is None else known


class Together:
    """A model's modules, parameters and hooks as they are; parted, then put together again.

    Parameters keep their identity (and their class) over it, but those replaced hold nothing meanwhile.

    Args:
        model: whole.
        part: takes it to pieces in place: replaces parameters, hooks itself to modules.
    """

    def __init__(self, model: nn.Module, part: Callable[[], None]) -> None:
        self.model = model
        self._modules = [(module, _Module(module)) for module in model.modules()]
        part()
        for module, before in self._modules:
            before.lay_down(module)

    def again(self, values: Mapping[str, Tensor]) -> None:
        """Everything as it was, with these parameters and buffers, by name."""
        for module, before in self._modules:
            before.put_back(module)
        for name, parameter in self.model.named_parameters():
            parameter.data = values[name]
            parameter.grad = None


class _Module:
    """One module as it is."""

    def __init__(self, module: nn.Module) -> None:
        self.kind, self.keys = type(module), set(module.__dict__)
        self.parameters = dict(module._parameters)
        self.hooks = {key: dict(held) for key, held in module.__dict__.items() if key.endswith("_hooks")}

    def lay_down(self, module: nn.Module) -> None:
        """Let go of the values of what was replaced: the pieces are copies."""
        for name, parameter in self.parameters.items():
            if parameter is not None and parameter is not module._parameters[name]:
                parameter.data, parameter.grad = torch.empty(0, dtype=parameter.dtype), None

    def put_back(self, module: nn.Module) -> None:
        """Undo what was done to it."""
        module.__class__ = self.kind
        for key in set(module.__dict__) - self.keys:
            del module.__dict__[key]
        for key, held in self.hooks.items():  # in place: who hooked itself to it before finds its hook there
            module.__dict__[key].clear()
            module.__dict__[key].update(held)
        module._parameters.update(self.parameters)
        _module_state_mapping.pop(module, None)
