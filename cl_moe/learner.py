"""The LightningModule: loss, strategies' hooks, optimizers that survive growth, scores.

Legend: B batch, S positions, C columns of logits (classes known so far), V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from cl_moe.errors import InputError, RunFailedError
from cl_moe.growth.adapt import Event, replay
from cl_moe.layers import ExpertLayer, StepLoads, fold_load
from cl_moe.lean import LeanModule
from cl_moe.metrics import ExperienceScores, ExpertLoads
from cl_moe.models.base import ContinualModel
from cl_moe.optim import OptimizerSpec, OptimizerState, load_state_by_name, state_by_name
from cl_moe.seeds import derive_seed, generator, generator_states, set_generator_states
from cl_moe.strategies.base import Outlook, Step, Strategy
from cl_moe.stream import IGNORE, Experience, Stream

_REMEDY = "change: optimizer.lr (smaller), trainer.gradient_clip, or trainer.precision=32-true"
Note = Callable[[Mapping[str, float], int], None]


class Learner(LeanModule):
    """A model, what it learns by, and what resists its forgetting.

    Args:
        model: adapted before each experience by ``growth.adapt``.
        optimizer: built anew for each experience over what learns then.
        strategies: by name, in the order in which their hooks run.
        stream: for its kind, scenario and classes; its data is never touched here.
        seed: the data seed.
        log_every: batches between two points of ``train/*``.
    """

    def __init__(
        self,
        model: ContinualModel,
        optimizer: OptimizerSpec,
        strategies: Mapping[str, Strategy],
        stream: Stream,
        seed: int = 0,
        log_every: int = 20,
    ) -> None:
        super().__init__()
        if model.kind != stream.kind:
            raise InputError(
                got=f"a model for {model.kind} on stream {stream.name}",
                allowed=f"a model for {stream.kind}",
                key="model (or stream)",
            )
        self.model, self.optimizer_spec, self.strategies = model, optimizer, dict(strategies)
        self.kind, self.seed, self.log_every = stream.kind, seed, log_every
        self.ledger: list[Event] = []
        self.note: Note = lambda points, step: None
        self.optimizer_state: OptimizerState = {}
        self.experience: Experience | None = None
        self.group_of_class = _groups(stream) if stream.scenario == "task" else None
        self.column_of_class = torch.full((stream.num_classes,), -1)
        self.scores: ExperienceScores | None = None
        self.loads: ExpertLoads | None = None
        self._step_loads, self._balancing = StepLoads(), dict[int, ExpertLayer]()
        self.batches = 0  # of this experience that were trained
        self._restart: dict[str, Any] | None = None  # what a restart inside an experience goes on with
        self._in_order = False  # whether a class is its own column, which spares a look-up in every step
        self.tick, self.between_steps, self.between_tests = _nothing, _nothing, _nothing
        # Only hooks that do something are called in every step.
        acting = list(self.strategies.values())
        self._batch_hooks = [s for s in acting if type(s).batch is not Strategy.batch]
        self._loss_hooks = [s for s in acting if type(s).loss is not Strategy.loss]
        self._gradient_hooks = [s for s in acting if type(s).gradients is not Strategy.gradients]

    # ---- training

    def outlook(self) -> Outlook:
        """What strategies may know of the experience that is set."""
        assert self.experience is not None
        return Outlook(self.model, self.experience, self.kind, self.seed, self.group_of_class)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """A fresh optimizer: newborns in, frozen ones out, survivors' state carried where asked for."""
        optimizer = self.optimizer_spec.build(self.named_parameters())
        if self.optimizer_spec.state == "carry" or self._restart:
            load_state_by_name(optimizer, self.named_parameters(), self.optimizer_state)
        return optimizer

    def on_train_start(self) -> None:
        """Seed what draws from torch's global generators (dropout, jitter); open the strategies.

        After a restart inside the experience, strategies and generators are then put to where they were.
        """
        assert self.experience is not None
        torch.manual_seed(derive_seed(self.seed, self.experience.index, "train"))
        self.place_classes()
        self.batches = 0
        self._balancing = {i: layer for i, layer in self.model.expert_layers.items() if layer.wants_load}
        for strategy in self.strategies.values():
            strategy.begin(self.outlook())
        if self._restart is not None:
            self._load_strategies(self._restart["strategies"])
            self.batches = self._restart["batches"]
            set_generator_states(self._restart["generators"])
            self._restart = None

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Task loss, the routers' auxiliary losses and the strategies' terms, added up."""
        inputs, targets = batch
        for strategy in self._batch_hooks:
            inputs, targets = strategy.batch(inputs, targets)
        mask = padding_mask(targets) if self.kind == "language" else None
        inputs, targets = self.model.pose(inputs, targets, self._draw)
        logits, routings = self.model(inputs, mask=mask)
        terms = {"task_loss": self.task_loss(logits, targets)}
        for routing in routings.values():
            _add_terms(terms, routing.losses)
        self._step_loads.add(self._balancing, routings)
        if self._loss_hooks:
            step = Step(self.model, inputs, targets, mask, logits, routings, terms["task_loss"])
            for strategy in self._loss_hooks:
                _add_terms(terms, strategy.loss(step))
        loss = torch.stack(list(terms.values())).sum() if len(terms) > 1 else terms["task_loss"]
        self._watch(loss, terms)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count the batch; between two optimizer steps, let the run be saved."""
        self.batches += 1
        self.tick()
        stepped = (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0
        if stepped and not self.trainer.is_last_batch:
            self.between_steps()

    def on_train_epoch_end(self) -> None:
        """The same after an epoch's last batch: only here do Lightning's counters restart well from there.

        After a fit's last epoch they do not, and need not: what follows is the end of the fit.
        """
        assert self.trainer.max_epochs is not None
        if self.trainer.current_epoch + 1 < self.trainer.max_epochs:
            self.between_steps()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Let strategies work on the gradients."""
        for strategy in self._gradient_hooks:
            strategy.gradients(self.model)
        self._step_loads.apply(self._balancing)

    def on_train_end(self) -> None:
        """Refuse broken weights, close the strategies, keep the optimizer's state by name."""
        broken = [name for name, value in self.model.state_dict().items() if not value.isfinite().all()]
        if broken:
            raise RunFailedError(f"weights not finite after step {self.global_step}: {broken[0]}\n{_REMEDY}")
        for strategy in self.strategies.values():
            strategy.end(self.outlook())
        self.optimizer_state = self._live_optimizer_state() if self.optimizer_spec.state == "carry" else {}

    def task_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy, nats per example or per token; padding left out."""
        if self.kind == "language":
            return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE)
        columns = targets if self._in_order else self.column_of_class[targets]
        return F.cross_entropy(self.own_task(logits, targets).float(), columns)

    def own_task(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Logits with other tasks' columns at -inf where the scenario gives the task away; else unchanged."""
        if self.group_of_class is None:
            return logits
        task_C = self.group_of_class[self.model.head.classes]
        return logits.masked_fill(task_C != self.group_of_class[targets].unsqueeze(1), -math.inf)

    def place_classes(self) -> None:
        """Note which column of the logits each class has, and put it where the model computes."""
        classes = self.model.head.classes
        self.column_of_class = torch.full_like(self.column_of_class, -1, device=self.device)
        self._in_order = classes == list(range(len(classes)))
        if self.kind == "classification" and classes:
            self.column_of_class[classes] = torch.arange(len(classes), device=self.device)
        if self.group_of_class is not None:
            self.group_of_class = self.group_of_class.to(self.device)

    def _draw(self) -> torch.Generator:
        """For what the model draws for a batch: the same after a restart."""
        return generator(self.seed, self.outlook().experience.index, "pose", self.batches)

    def _watch(self, loss: Tensor, terms: Mapping[str, Tensor]) -> None:
        due = self.batches % self.log_every == 0
        # Reading a number costs an accelerator its queue, so it is read every step on the CPU only.
        if not due and loss.is_cuda:
            return
        if not math.isfinite(loss.item()):
            values = ", ".join(f"{name} {value.item():.4g}" for name, value in terms.items())
            raise RunFailedError(f"loss not finite at step {self.global_step}: {values}\n{_REMEDY}")
        if due:
            points = (
                {f"train/{name}": value.item() for name, value in terms.items()} if len(terms) > 1 else {}
            )
            self.note({"train/loss": loss.item(), **points}, self.global_step)

    # ---- evaluation

    def on_test_start(self) -> None:
        """Columns of the classes known by now."""
        self.place_classes()

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Fold one batch of one experience's test data into scores and loads."""
        inputs, targets = batch
        mask = padding_mask(targets) if self.kind == "language" else None
        inputs, targets = self.model.pose(inputs, targets, lambda: generator(0, "evaluation", batch_idx))
        logits, routings = self.model(inputs, mask=mask)
        if not logits.isfinite().all():  # an argmax over them would be a score like any other
            place = f"after step {self.global_step}, on test set {dataloader_idx}"
            raise RunFailedError(f"output not finite in an evaluation {place}\n{_REMEDY}")
        total, count = self.score(logits, targets)
        assert self.scores is not None
        assert self.loads is not None
        self.scores.update(dataloader_idx, total, count)
        self.loads.update(dataloader_idx, {block: fold_load(r) for block, r in routings.items()})
        self.between_tests()

    def score(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Sum and number of scores: right answers, or minus the loss of each real token in nats.

        A class without a column yet (its rows are not born) is never answered right.
        """
        if self.kind == "language":
            flat = targets.flatten()
            loss = F.cross_entropy(logits.flatten(0, 1).float(), flat, ignore_index=IGNORE, reduction="none")
            return -loss.double().sum(), (flat != IGNORE).sum()
        count = torch.tensor(len(targets))
        if logits.shape[1] == 0:
            return torch.zeros((), dtype=torch.float64), count
        answer = self.own_task(logits, targets).argmax(dim=1)
        return (answer == self.column_of_class[targets]).double().sum(), count

    # ---- state

    def whole_state(self, inside: bool = False) -> dict[str, Any]:
        """Everything a restart needs, ledger first; tensors and plain Python only.

        Args:
            inside: between two steps of an experience; else at a boundary.
        """
        restart = {"batches": self.batches, "generators": generator_states()} if inside else None
        return {
            "ledger": self.ledger,
            "model": self.model.state_dict(),
            "optimizer": self._live_optimizer_state() if inside else self.optimizer_state,
            "optimizer_class": type(self.optimizer_spec).__name__,
            "strategies": {name: strategy.state_dict() for name, strategy in self.strategies.items()},
            "restart": restart,
        }

    def load_whole_state(self, state: Mapping[str, Any]) -> None:
        """Replay the ledger on a fresh model, then load weights, optimizer state and strategies."""
        self.ledger = list(state["ledger"])
        replay(self.model, self.ledger)
        self.model.load_state_dict(state["model"])
        same = state["optimizer_class"] == type(self.optimizer_spec).__name__  # a branch may choose another
        self.optimizer_state = dict(state["optimizer"]) if same else {}
        self._load_strategies(state["strategies"])
        self._restart = state["restart"] and {**state["restart"], "strategies": state["strategies"]}

    def _load_strategies(self, states: Mapping[str, Any]) -> None:
        for name, strategy in self.strategies.items():
            if name in states:
                strategy.load_state_dict(states[name])

    def _live_optimizer_state(self) -> OptimizerState:
        return state_by_name(self.trainer.optimizers[0], self.named_parameters())


def _nothing() -> None:
    """What nobody asked for."""


def padding_mask(targets: Tensor) -> Tensor | None:
    """(B, S) bool, False on padding; None where there is none, which spares the layers the work."""
    mask = targets != IGNORE
    return None if bool(mask.all()) else mask


def _add_terms(terms: dict[str, Tensor], more: Mapping[str, Tensor]) -> None:
    """Terms of one name add up: several layers balance their load, a strategy may stand twice."""
    for name, value in more.items():
        terms[name] = terms[name] + value if name in terms else value


def _groups(stream: Stream) -> Tensor:
    group = torch.full((stream.num_classes,), -1)
    for index, classes in enumerate(stream.class_groups):
        group[list(classes)] = index
    return group
