"""Sparse memory finetuning (Lin et al. 2025, 2510.15103): only the memory rows that are new's own may learn.

Legend: N experts (memory slots) of a layer, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cl_moe.errors import InputError
from cl_moe.layers.product_key_layer import ProductKeyLayer
from cl_moe.layers.ranks import sum_over_ranks
from cl_moe.layers.routing import fold_load
from cl_moe.layers.tables import row_gradient
from cl_moe.models.base import ContinualModel
from cl_moe.seeds import generator
from cl_moe.strategies.base import Batch, Outlook, Setting, Step, Strategy, tensor_bytes
from cl_moe.strategies.checks import check_beside
from cl_moe.strategies.passes import ask, learning, quiet
from cl_moe.strategies.teacher import check_weight

SCORES = ("tf_idf", "tf", "all")


class SparseMemory(Strategy):
    """After the first experience nothing learns but, in each step, few rows of the product-key memories.

    Of each layer those ``top_t`` rows learn that the step's batch reads much and the background seldom:
    ``c(i) / sum c * ln((B + 1) / (sum_b 1[c_b(i) > 0] + 1))``, c the batch's reads of row i, c_b those of B
    fixed background batches of the first experience (section 3; TF-IDF of slots). Their values ``v`` move by
    plain gradient descent with a rate of their own, whatever the run's optimizer is, and its momentum never
    touches them. Everything else stands still from then on, query statistics included, except the head's rows
    of classes that were never trained.

    The first experience is trained as without this strategy: it stands for the pretraining.

    Args:
        top_t: rows per layer and step.
        lr: rate of those rows.
        score: ``"tf_idf"``; ``"tf"``, reads alone; ``"all"``, every row that was read learns.
        rows: ``"v"``, the values; ``"uv"``, all vectors of an expert (``layer=peer``).
        num_background: B, background batches.
        background_size: examples in each, drawn without replacement.
    """

    takes_rows = True
    needs_past = True
    stops_learning = True

    def __init__(
        self,
        top_t: int = 500,
        lr: float = 0.1,
        score: str = "tf_idf",
        rows: str = "v",
        num_background: int = 1000,
        background_size: int = 32,
    ) -> None:
        check_weight(lr, "strategy.sparse_memory.lr", above=True)
        counts = {"top_t": top_t, "num_background": num_background, "background_size": background_size}
        for name, count in counts.items():
            if not isinstance(count, int) or count < 1:
                key = f"strategy.sparse_memory.{name}"
                raise InputError(got=f"{name}={count!r}", allowed="a whole number, at least 1", key=key)
        for name, choice, known in (("score", score, SCORES), ("rows", rows, ("v", "uv"))):
            if choice not in known:
                key = f"strategy.sparse_memory.{name}"
                raise InputError(got=f"{name}={choice}", allowed=", ".join(known), key=key)
        self.top_t, self.lr, self.score, self.rows = top_t, lr, score, rows
        self.num_background, self.background_size = num_background, background_size
        self.background: dict[int, Tensor] = {}  # (N,) batches that read each row, by block
        self.trained: list[int] = []  # classes
        self._reads: dict[int, Tensor] = {}  # (N,) of the step under way
        self._sparse, self._open = False, list[str]()
        self._norms: list[torch.nn.Module] = []

    def check(self, setting: Setting) -> None:
        """There are rows to choose among."""
        check_beside(
            "sparse_memory", setting, ("shrink_perturb", "continual_backprop"), "moves what stands still"
        )
        layers = setting.model.expert_layers.values()
        foreign = {type(layer).__name__ for layer in layers if not isinstance(layer, ProductKeyLayer)}
        if foreign or not layers:
            found = ", ".join(sorted(foreign)).lower() or "dense"
            raise InputError(
                got=f"strategy=sparse_memory with layer={found}",
                allowed="layer=peer or layer=pkm, whose rows it chooses among",
                key="layer (or strategy)",
            )

    def begin(self, outlook: Outlook) -> None:
        """Note what may learn beside the rows."""
        self._reads, self._sparse = {}, bool(self.background)
        head, first, self._open = outlook.model.head, 0, []
        for place, rows in enumerate(head.cohorts):
            labels = head.classes[first : first + rows.out_features]  # type: ignore[operator]
            first += len(labels)
            if outlook.kind == "classification" and not set(labels) & set(self.trained):
                self._open += [f"head.cohorts.{place}.{name}" for name, _ in rows.named_parameters()]
        self._norms = [
            part for part in outlook.model.modules() if self._sparse and hasattr(part, "running_mean")
        ]

    def batch(self, inputs: Tensor, targets: Tensor) -> Batch:
        """The batch as it is; statistics stand still for it."""
        for norm in self._norms:
            norm.training = False
        return inputs, targets

    def loss(self, step: Step) -> dict[str, Tensor]:
        """Nothing to add; which rows were read is counted."""
        if self._sparse:
            for block, routing in step.routings.items():
                if block >= 0:
                    count_N = fold_load(routing).count
                    self._reads[block] = self._reads[block] + count_N if block in self._reads else count_N
        return {}

    @torch.no_grad()
    def gradients(self, model: ContinualModel) -> None:
        """Move the chosen rows; leave the optimizer nothing but new head rows."""
        if not self._sparse:
            return
        for block, layer in model.expert_layers.items():
            assert isinstance(layer, ProductKeyLayer)
            self._reads[block] = sum_over_ranks(self._reads[block])
            chosen_N, first = self.chosen(block), 0
            for cohort, size in zip(layer.cohorts, layer.cohort_sizes, strict=True):
                mine_n = chosen_N[first : first + size]
                first += size
                for name in cohort.tables if self.rows == "uv" else ("v",):  # type: ignore[union-attr]
                    self._move(getattr(cohort, str(name)), mine_n)
        for name, parameter in learning(model).items():
            if name not in self._open:
                parameter.grad = None
        self._reads = {}

    def _move(self, table: torch.nn.Parameter, mine_n: Tensor) -> None:
        touched = row_gradient(table)
        if touched is not None:
            row_U, value_UD = touched
            mine_U = mine_n[row_U]
            table[row_U[mine_U]] -= self.lr * value_UD[mine_U]
        elif table.grad is not None and table.requires_grad:
            table[mine_n] -= self.lr * table.grad[mine_n]

    def chosen(self, block: int) -> Tensor:
        """(N,) bool: the rows of a layer that may learn in this step; ties go to the older row."""
        count_N = self._reads[block]
        read_N = count_N > 0
        if self.score == "all" or int(read_N.sum()) <= self.top_t:
            return read_N
        score_N = count_N.double() / count_N.sum()
        if self.score == "tf_idf":
            known_N = self.background[block].to(count_N.device)
            seen_N = torch.nn.functional.pad(known_N, (0, len(count_N) - len(known_N)))  # newborns: never
            score_N = score_N * ((self.num_background + 1) / (seen_N + 1)).double().log()
        best = score_N.masked_fill(~read_N, -1.0).sort(descending=True, stable=True).indices[: self.top_t]
        return torch.zeros_like(read_N).index_fill(0, best, True)

    @torch.no_grad()
    def end(self, outlook: Outlook) -> None:
        """After the first experience: which rows its batches read."""
        for norm in self._norms:
            norm.training = True
        self.trained += [label for label in outlook.experience.classes if label not in self.trained]
        data = outlook.experience.train.tensors
        if self.background or not len(data[0]):
            return
        draw = generator(outlook.seed, outlook.experience.index, "background")
        with quiet(outlook.model):
            for _ in range(self.num_background):
                rows = torch.randperm(len(data[0]), generator=draw)[: self.background_size]
                for block, count_N in self._counts(outlook, [c[rows] for c in data], draw).items():
                    before = self.background.get(block, torch.zeros_like(count_N))
                    self.background[block] = before + (count_N > 0)

    @staticmethod
    def _counts(outlook: Outlook, data: list[Tensor], draw: torch.Generator) -> dict[int, Tensor]:
        routings = ask(outlook, data[0], data[1], lambda: draw).routings
        return {block: fold_load(r).count.cpu() for block, r in routings.items() if block >= 0}

    def state_dict(self) -> dict[str, Any]:
        """The background's counts, classes trained, reads since the last step."""
        return {"background": self.background, "trained": self.trained, "reads": self._reads}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        self.background, self.trained = dict(state["background"]), list(state["trained"])
        self._reads = dict(state["reads"])

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the background's counts."""
        return tensor_bytes(*self.background.values())
