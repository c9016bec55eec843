"""Dark experience replay (Buzzega et al. 2020, 2004.07211): DER++, and DER with ``beta=0``.

Legend: B batch, S positions, C columns of logits, m rows of the memory.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from cl_moe import agreement
from cl_moe.batches import is_asked, padding_mask
from cl_moe.errors import InputError
from cl_moe.layers.precision import wide
from cl_moe.seeds import derive_seed
from cl_moe.strategies.base import Outlook, Step, Strategy
from cl_moe.strategies.memory import Reservoir, check_memory_size
from cl_moe.strategies.passes import ask, question_of, quiet
from cl_moe.strategies.teacher import check_weight

KEEP = ("step", "end")


class DER(Strategy):
    """Keeps examples with the answers that the model gave, and holds it to both.

    Two memories' worth of rows are drawn for each step, each as many as the batch has new ones: the term
    ``alpha * mean (logits - logits kept)^2`` of the one (equation 6; the mean over rows and columns, as the
    authors' code has it) and ``beta * task loss`` of the other (equation 7). A column that was not born when
    an answer was given is held to 0 there; the authors' head has all columns from the start, and DER keeps
    more by what it says of classes to come. In regression the answers are numbers, and are held as they are.

    Among ranks, every rank keeps the whole memory, and puts all that was drawn for a step to its model.

    Args:
        memory_size: examples kept (sequences, for language), with their logits.
        alpha: strength of the kept answers.
        beta: strength of the kept labels; 0 for DER.
        keep: ``"step"``: the reservoir is offered every batch with its answers of that step, in every epoch
            (algorithm 1); ``"end"``: every example once, with its answers after the experience, as other
            implementations have it.
    """

    def __init__(
        self, memory_size: int = 200, alpha: float = 0.1, beta: float = 0.5, keep: str = "step"
    ) -> None:
        check_memory_size(memory_size, "strategy.der.memory_size")
        check_weight(alpha, "strategy.der.alpha")
        check_weight(beta, "strategy.der.beta")
        if keep not in KEEP:
            raise InputError(got=f"keep={keep}", allowed=", ".join(KEEP), key="strategy.der.keep")
        self.alpha, self.beta, self.keep = alpha, beta, keep
        self.memory = Reservoir(memory_size)  # columns: inputs, targets, logits
        self._draw, self._steps = torch.Generator(), 0
        self._outlook: Outlook | None = None

    def begin(self, outlook: Outlook) -> None:
        """Draw this experience's memories from a seed of their own."""
        self._draw.manual_seed(derive_seed(outlook.seed, outlook.experience.index, "der"))
        self._outlook, self._steps = outlook, 0

    def loss(self, step: Step) -> dict[str, Tensor]:
        """The two terms, as soon as there is a memory; then the batch is offered to it."""
        count = len(step.targets) if step.num_new is None else step.num_new
        count_all = count if step.all_new is None else step.all_new
        terms = {}
        if len(self.memory):
            if self.alpha:
                terms["der_logits"] = self.alpha * self._answers(step, count_all)
            if self.beta:
                terms["der_labels"] = self.beta * self._labels(step, count_all)
        if count_all and self.keep == "step":
            new = (step.inputs[:count], step.targets[:count], step.logits[:count])
            self._take(*(agreement.rows_of_all(column) for column in new))
            self._steps += 1
        return terms

    def _pass(self, step: Step, count: int) -> tuple[Tensor, ...]:
        """Logits of now, targets, and logits of then, of rows drawn for one term."""
        kept = self.memory.sample(count, self._draw)
        inputs, targets, old = (column.to(step.logits.device) for column in kept)
        mask = padding_mask(targets) if targets.dim() > 1 else None
        return step.model(inputs, mask=mask)[0], targets, old

    def _answers(self, step: Step, count: int) -> Tensor:
        logits, targets, old = self._pass(step, count)
        held = is_asked(targets)  # no padding
        if self._outlook is not None and self._outlook.kind != "regression":
            held = held.unsqueeze(-1).expand_as(logits)
        away = (wide(logits) - _padded(old, logits.shape[-1])).square().masked_fill(~held, 0.0)
        return away.sum() / held.sum().clamp_min(1)

    def _labels(self, step: Step, count: int) -> Tensor:
        assert self._outlook is not None
        logits, targets, _ = self._pass(step, count)
        if not bool(is_asked(targets).any()):
            return logits.sum() * 0.0
        return question_of(self._outlook).task_loss(logits, targets)

    def _take(self, inputs: Tensor, targets: Tensor, logits: Tensor) -> None:
        columns = self.memory.columns
        if columns:
            columns[2] = _padded(columns[2], logits.shape[-1])
        row = (inputs, targets, wide(logits))
        self.memory.offer([column.detach().cpu() for column in row], self._draw)

    @torch.no_grad()
    def end(self, outlook: Outlook) -> None:
        """Keep the answers of now: if so asked, or of what it did not see being trained (a branch's past)."""
        data = outlook.experience.train.tensors
        if self._steps == 0 and len(data[0]):
            self._draw.manual_seed(derive_seed(outlook.seed, outlook.experience.index, "der"))
            order = torch.randperm(len(data[0]), generator=self._draw)
            with quiet(outlook.model):
                for rows in order.split(256):
                    answer = ask(outlook, data[0][rows], data[1][rows], lambda: self._draw)
                    self._take(answer.inputs, answer.targets, answer.logits)
        self._steps = 0

    def state_dict(self) -> dict[str, Any]:
        """Memory and draw."""
        return {**self.memory.state_dict(), "draw": self._draw.get_state(), "steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        self.memory.load_state_dict(state, "strategy.der.memory_size")
        self._draw.set_state(state["draw"])
        self._steps = state["steps"]

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the memory, logits included."""
        return self.memory.bytes


def _padded(logits: Tensor, width: int) -> Tensor:
    """With columns of 0 for classes born since."""
    return F.pad(logits, (0, width - logits.shape[-1]))
