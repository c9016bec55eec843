"""Gradient episodic memory (Lopez-Paz & Ranzato 2017, 1706.08840).

Legend: K past experiences.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

from cl_moe.errors import InputError
from cl_moe.models.base import ContinualModel
from cl_moe.seeds import derive_seed, generator
from cl_moe.strategies.base import Outlook, Setting, Strategy, tensor_bytes
from cl_moe.strategies.memory import check_memory_size
from cl_moe.strategies.passes import learning, memory_gradient
from cl_moe.strategies.teacher import check_weight


class GEM(Strategy):
    """Lets no step raise the loss on any past experience's memory, to first order.

    Where the gradient g points away from that of a past experience's loss, it becomes the nearest one that
    points away from none of them (equation 8): ``g + G' v``, v the solution of the dual quadratic program
    in as many unknowns as there are past experiences (equation 11), found exactly (an active-set method).
    With a ``margin``, v >= margin in every step that is changed, as in the authors' code, which favours steps
    that also lower old losses.

    Memory is shared evenly by the experiences so far, so it shrinks for the old ones as new ones come (the
    paper's way where their number is not known before).

    Args:
        memory_size: examples kept in all (sequences, for language).
        margin: the paper's gamma, its strength of memories, >= 0.
    """

    computes = False
    needs_past = True

    def __init__(self, memory_size: int = 200, margin: float = 0.5) -> None:
        check_memory_size(memory_size, "strategy.gem.memory_size")
        check_weight(margin, "strategy.gem.margin")
        self.memory_size, self.margin = memory_size, margin
        self.memories: list[list[Tensor]] = []  # of each past experience: inputs, targets; in random order
        self._draw = torch.Generator()
        self._outlook: Outlook | None = None

    def check(self, setting: Setting) -> None:
        """Every past experience needs an example."""
        if self.memory_size < len(setting.stream):
            raise InputError(
                got=f"strategy=gem with a memory of {self.memory_size} for {len(setting.stream)} experiences",
                allowed="at least one example for each",
                key="strategy.gem.memory_size",
            )

    def begin(self, outlook: Outlook) -> None:
        """Draw what the model asks for when it looks back from a seed of its own."""
        self._draw.manual_seed(derive_seed(outlook.seed, outlook.experience.index, "gem"))
        self._outlook = outlook

    def gradients(self, model: ContinualModel) -> None:
        """Replace the gradient by the nearest one that all memories can bear."""
        if not self.memories or self._outlook is None:
            return
        past = [memory_gradient(self._outlook, (m[0], m[1]), self._draw) for m in self.memories]
        live = learning(model)
        gram_KK, along_K = np.zeros((len(past), len(past))), np.zeros(len(past))
        for name, parameter in live.items():
            none = torch.zeros_like(parameter)
            stacked = torch.stack([g.get(name, none).double().flatten() for g in past])
            gram_KK += (stacked @ stacked.t()).cpu().numpy()
            if parameter.grad is not None:
                along_K += (stacked @ parameter.grad.double().flatten()).cpu().numpy()
        if (along_K >= 0).all():
            return
        for share, gradients in zip(dual(gram_KK, along_K, self.margin).tolist(), past, strict=True):
            for name, gradient in gradients.items():
                parameter = live[name]
                added = share * gradient
                parameter.grad = added if parameter.grad is None else parameter.grad + added

    def end(self, outlook: Outlook) -> None:
        """Keep a part of the experience; the older ones' parts shrink to as much."""
        data = outlook.experience.train.tensors
        if not len(data[0]):
            return
        draw = generator(outlook.seed, outlook.experience.index, "gem memory")
        order = torch.randperm(len(data[0]), generator=draw)
        self.memories.append([column[order] for column in data])
        share, rest = divmod(self.memory_size, len(self.memories))
        self.memories = [
            [column[: share + (place < rest)].clone() for column in memory]
            for place, memory in enumerate(self.memories)
        ]

    def state_dict(self) -> dict[str, Any]:
        """Memories and draw."""
        return {"memories": self.memories, "draw": self._draw.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        self.memories = [list(memory) for memory in state["memories"]]
        self._draw.set_state(state["draw"])

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the memories."""
        return tensor_bytes(*(column for memory in self.memories for column in memory))


def dual(gram_KK: np.ndarray, along_K: np.ndarray, margin: float = 0.0) -> np.ndarray:
    """(K,) v >= margin that minimises ``v' G G' v / 2 + g' G' v`` (equation 11).

    With ``v = margin + w`` and ``G G' = A' A`` it is the least-squares problem ``|A w - b|`` over w >= 0,
    which ``scipy.optimize.nnls`` solves by active sets in finitely many steps.

    Args:
        gram_KK: G G', products of the past gradients.
        along_K: G g, their products with the new one.
        margin: lower bound of v.

    >>> dual(np.eye(2), np.array([-1.0, 2.0])).tolist()
    [1.0, 0.0]
    """
    along_K = along_K + margin * gram_KK.sum(axis=1)
    values_K, vectors_KK = np.linalg.eigh(gram_KK)
    real_K = values_K > values_K.max() * 1e-12  # gradients that depend on each other add no direction
    roots = np.sqrt(values_K[real_K])
    a = roots[:, None] * vectors_KK[:, real_K].T
    b = -(vectors_KK[:, real_K].T @ along_K) / roots
    return nnls(a, b)[0] + margin
