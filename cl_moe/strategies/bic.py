"""Bias correction (BiC; Wu et al. 2019, "Large scale incremental learning", 1905.13260).

Legend: B batch, C columns of logits, n validation examples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.utils.data import TensorDataset

from cl_moe.errors import InputError
from cl_moe.models.base import ContinualModel
from cl_moe.seeds import generator
from cl_moe.strategies.base import Outlook, Setting, Strategy, tensor_bytes
from cl_moe.strategies.checks import check_new_classes, check_room
from cl_moe.strategies.memory import check_memory_size
from cl_moe.strategies.passes import quiet, to_model
from cl_moe.stream import Experience, Stream, take


class BiC(Strategy):
    """Logits of an experience's classes become ``alpha z + beta``, fitted on held-out examples.

    The two numbers are those of equation 4, one pair for each experience from the second on; they minimise
    the cross-entropy (equation 5) on a balanced memory of examples that are never trained on: a share of each
    experience's training data is held out for it. The fit is convex, and done to its end. Evaluations rank
    classes by the corrected logits; training sees the raw ones. The method's first stage is replay and
    distillation beside it, ``strategy=[replay,lwf,bic]``; LwF's teacher answers uncorrected here.

    Args:
        memory_size: held-out examples kept, the same number of each class; at least one for each.
        held_out: share of each class's training examples that is held out, in (0, 1); at least one.
        seed: for which ones.
    """

    needs_past = True

    def __init__(self, memory_size: int = 50, held_out: float = 0.1, seed: int = 0) -> None:
        check_memory_size(memory_size, "strategy.bic.memory_size")
        if not isinstance(held_out, int | float) or not 0 < held_out < 1:
            key = "strategy.bic.held_out"
            raise InputError(got=f"held_out={held_out!r}", allowed="a share between 0 and 1", key=key)
        self.memory_size, self.held_out, self.seed = memory_size, held_out, seed
        self.memory: dict[int, Tensor] = {}  # inputs of each class
        self.corrections: list[tuple[list[int], float, float]] = []  # classes, alpha, beta
        self._held: dict[int, TensorDataset] = {}  # by experience

    def check(self, setting: Setting) -> None:
        """New classes compete with old ones."""
        stream = setting.stream
        check_new_classes("bic", stream)
        if stream.scenario == "task" or "weight_aligning" in setting.names:
            what = "stream.scenario=task" if stream.scenario == "task" else "weight_aligning"
            raise InputError(
                got=f"strategy=bic with {what}",
                allowed="stream.scenario=class, and one correction of the head",
                key="strategy (or stream.scenario)",
            )
        check_room("bic", self.memory_size, stream)

    def view(self, stream: Stream) -> Stream:
        """Every experience without what is held out of it."""
        return replace(stream, experiences=tuple(self._without(experience) for experience in stream))

    def _without(self, experience: Experience) -> Experience:
        targets, rows = experience.train.tensors[1], []
        for label in targets.unique().tolist():
            mine = (targets == label).nonzero().squeeze(1)
            draw = generator(self.seed, experience.index, "bic", label)
            count = max(1, round(self.held_out * len(mine)))
            rows.append(mine[torch.randperm(len(mine), generator=draw)[:count]])
        held = torch.cat(rows)
        kept = torch.ones(len(targets), dtype=torch.bool).index_fill(0, held, False)
        self._held[experience.index] = take(experience.train, held)
        return replace(experience, train=take(experience.train, kept.nonzero().squeeze(1)))

    def end(self, outlook: Outlook) -> None:
        """Take in what was held out; from the second experience on, correct the newest classes."""
        experience = outlook.experience
        new = [label for label in experience.classes if label not in self.memory]
        first = not self.memory
        self._take_in(*self._held[experience.index].tensors)
        if not new or first:
            return
        targets = torch.cat([torch.full((len(kept),), label) for label, kept in self.memory.items()])
        with quiet(outlook.model), torch.no_grad():
            raw, _ = outlook.model(to_model(outlook.model, torch.cat(list(self.memory.values()))))
        classes = outlook.model.head.classes
        logits_nC = self.corrected(raw.double().cpu(), classes)[:, [classes.index(c) for c in self.memory]]
        column = {label: place for place, label in enumerate(self.memory)}
        targets_n = torch.tensor([column[label] for label in targets.tolist()])
        alpha, beta = fit(logits_nC, targets_n, [column[label] for label in new])
        self.corrections.append((new, alpha, beta))

    def _take_in(self, inputs: Tensor, targets: Tensor) -> None:
        labels = list(dict.fromkeys([*self.memory, *targets.tolist()]))
        share = self.memory_size // len(labels)
        for label in labels:
            rows = [self.memory[label]] if label in self.memory else []
            self.memory[label] = torch.cat([*rows, inputs[targets == label]])[:share].clone()

    def corrected(self, logits: Tensor, classes: list[int]) -> Tensor:
        """Logits (B, C) of these classes, each experience's with its correction."""
        logits = logits.clone()
        for labels, alpha, beta in self.corrections:
            columns = [c for c, label in enumerate(classes[: logits.shape[1]]) if label in labels]
            logits[:, columns] = alpha * logits[:, columns] + beta
        return logits

    def predict(self, model: ContinualModel, features: Tensor, logits: Tensor) -> Tensor:
        """The corrected logits."""
        return self.corrected(logits, model.head.classes)

    def state_dict(self) -> dict[str, Any]:
        """Memory and corrections."""
        return {"memory": dict(self.memory), "corrections": list(self.corrections)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them back."""
        self.memory = dict(state["memory"])
        self.corrections = [(list(labels), alpha, beta) for labels, alpha, beta in state["corrections"]]

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the memory."""
        return tensor_bytes(*self.memory.values())


def fit(logits_nC: Tensor, targets_n: Tensor, new: list[int]) -> tuple[float, float]:
    """Alpha and beta of the columns ``new`` that minimise the cross-entropy; the others stay as they are.

    Args:
        logits_nC: float64.
        targets_n: columns.
        new: columns.
    """
    pair = torch.tensor([1.0, 0.0], dtype=torch.float64, requires_grad=True)
    is_new_C = torch.zeros(logits_nC.shape[1], dtype=torch.bool)
    is_new_C[new] = True
    optimizer = torch.optim.LBFGS([pair], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(torch.where(is_new_C, pair[0] * logits_nC + pair[1], logits_nC), targets_n)
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    alpha, beta = pair.detach().tolist()
    return alpha, beta
