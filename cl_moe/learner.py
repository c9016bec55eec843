"""The LightningModule: loss, strategies' hooks, optimizers that survive growth, scores.

Legend: B batch, S positions, C columns of logits (classes known so far).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cl_moe import agreement
from cl_moe.batches import broken_inputs, padding_mask
from cl_moe.errors import InputError, RunFailedError
from cl_moe.growth import Trace
from cl_moe.growth.adapt import Event, replay
from cl_moe.layers import ExpertLayer, Routing, StepLoads
from cl_moe.lean import LeanModule, scale_rates
from cl_moe.metrics.answers import OnlineScore
from cl_moe.models.base import ContinualModel
from cl_moe.models.watching import watching
from cl_moe.optim import OptimizerSpec, OptimizerState, load_state_by_name
from cl_moe.scoring import Scoring, add_terms
from cl_moe.seeds import derive_seed, generator, generator_states, set_generator_states
from cl_moe.strategies.base import Answer, Hooks, Outlook, Setting, Step, Strategy
from cl_moe.strategies.checks import check_together, only_one
from cl_moe.strategies.passes import answering
from cl_moe.stream import Experience, Stream

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
            got = f"a model for {model.kind} on stream {stream.name}"
            raise InputError(got=got, allowed=f"a model for {stream.kind}", key="model (or stream)")
        self.model, self.optimizer_spec, self.strategies = model, optimizer, dict(strategies)
        self.kind, self.seed, self.log_every = stream.kind, seed, log_every
        self.ledger: list[Event] = []
        self.note: Note = lambda points, step: None
        self.optimizer_state: OptimizerState = {}
        self.experience: Experience | None = None
        self.scoring = scoring = Scoring(stream)
        self.task_loss, self.own_task, self.score = scoring.task_loss, scoring.own_task, scoring.score
        self.online = OnlineScore()  # of this experience's first pass
        self.trace = Trace()  # what schedule and policy want to see of training
        self._step_loads, self._balancing = StepLoads(), dict[int, ExpertLayer]()
        self._restart: dict[str, Any] | None = None  # what a restart inside an experience goes on with
        self._hooks = Hooks.of(self.strategies)
        self._classifier = only_one(self.strategies, "predict", "each classifies in its own way")
        self._answerer = only_one(self.strategies, "answer", "each asks the model in its own way")
        check_together(self.strategies, Setting(model, stream, tuple(self.strategies)), optimizer.rows)

    # ---- training

    def outlook(self) -> Outlook:
        """What strategies may know of the experience that is set."""
        assert self.experience is not None
        known = (self.scoring.group_of_class, self.scoring, self.accumulate, self.forget)
        return Outlook(self.model, self.experience, self.kind, self.seed, *known)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """A fresh optimizer: newborns in, frozen ones out, survivors' state carried where asked for."""
        optimizer = self.optimizer_spec.build(self.named_parameters())
        if self.optimizer_state:
            load_state_by_name(optimizer, self.named_parameters(), self.optimizer_state)
            self.optimizer_state = {}  # the optimizer's own from here on
        return optimizer

    def on_train_start(self) -> None:
        """Seed what draws from torch's global generators (dropout, jitter); open the strategies.

        After a restart inside the experience, strategies and generators are then put to where they were.
        """
        index = self.outlook().experience.index
        torch.manual_seed(derive_seed(self.seed, index, "train", *agreement.words()))
        self.place_classes()
        self.batches, self.first_pass = 0, int(self.trainer.num_training_batches)
        self._balancing = {i: layer for i, layer in self.model.expert_layers.items() if layer.wants_load}
        if self._restart is None:
            self.charges.forget(self.cost_varies(training=True))
            self.online.reset()
            self.trace.open(self.first_pass, index)
        for strategy in self.strategies.values():
            with self.charges.counting(strategy.computes and self._restart is None):
                strategy.begin(self.outlook())
        if self._restart is not None:
            self._load_strategies(self._restart["strategies"])
            self.batches = self._restart["batches"]
            set_generator_states(self._restart["generators"])
            self._restart = None

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Task loss, the routers' auxiliary losses and the strategies' terms, added up."""
        (inputs, targets), num_new = batch, len(batch[1])
        if self._hooks.batch:
            with self.charges.step("batch", inputs, varies=True):
                for strategy in self._hooks.batch:
                    inputs, targets = strategy.batch(inputs, targets)
        mask = padding_mask(targets) if self.kind == "language" else None
        self.charges.examples += len(targets)
        varies = mask is not None or any(strategy.cost_varies for strategy in self._hooks.loss)
        inputs, targets = self.model.pose(inputs, targets, self._draw)
        part = agreement.part_of(inputs, targets, mask, num_new, self.scoring.asked, self.device)
        with self.charges.step("step", part.inputs, varies=varies, tokens=part.targets.numel()):
            return self._loss(part)

    def _loss(self, part: agreement.Part) -> Tensor:
        targets, num_new = part.targets, part.num_new
        try:
            logits, routings = self.model(part.inputs, mask=part.mask)
        except RunFailedError as error:  # a layer names what it was given, not when
            raise RunFailedError(f"step {self.global_step}: {error}") from error
        terms = {"task_loss": part.weigh(task_loss := self.task_loss(logits, targets))}
        if self.batches < self.first_pass and part.share != 0:
            with torch.no_grad():
                self.online.add(*self.scoring.of_new(logits, targets, num_new, task_loss))
        if self.trace.follows:
            self.trace.add(self.scoring.losses(logits[:num_new], targets[:num_new]), routings)
        for routing in routings.values():
            add_terms(terms, routing.losses)
        self._step_loads.add(self._balancing, routings)
        if self._hooks.loss:
            step = Step(self.model, *part[:3], logits, routings, task_loss, num_new, part.all_new)
            for strategy in self._hooks.loss:
                add_terms(terms, {name: part.weigh(term) for name, term in strategy.loss(step).items()})
        loss = torch.stack(list(terms.values())).sum() if len(terms) > 1 else terms["task_loss"]
        self._watch(loss, terms, part.inputs)
        return loss

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Charged with the step that it belongs to."""
        with self.charges.backward():
            super().backward(loss, *args, **kwargs)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Let strategies work on the gradients."""
        if self._hooks.gradients:
            with self.charges.step("gradients", varies=True):
                for strategy in self._hooks.gradients:
                    strategy.work_on_gradients(self.model)
        self._step_loads.apply(self._balancing)
        if self._hooks.rate:
            scale_rates(optimizer, math.prod(s.rate(*self.steps()) for s in self._hooks.rate))

    def on_train_end(self) -> None:
        """Keep the optimizer's state by name, refuse broken weights, close the strategies."""
        self.optimizer_state = self.live_optimizer_state() if self.optimizer_spec.state == "carry" else {}
        self.gather()
        broken = [name for name, value in self.model.state_dict().items() if not value.isfinite().all()]
        if broken:
            raise RunFailedError(f"weights not finite after step {self.global_step}: {broken[0]}\n{_REMEDY}")
        for strategy in self.strategies.values():
            with self.charges.counting(strategy.computes):
                strategy.end(self.outlook())
        self.trace.close({i: layer.cohort_sizes for i, layer in self.model.expert_layers.items()})

    def place_classes(self) -> None:
        """Note which column of the logits each class has now."""
        self.scoring.place(self.model.head.classes, self.device, len(self.model.head.arrived))

    def _draw(self) -> torch.Generator:
        """For what the model draws for a batch: the same after a restart."""
        return generator(self.seed, self.outlook().experience.index, "pose", self.batches)

    def _watch(self, loss: Tensor, terms: Mapping[str, Tensor], inputs: Tensor) -> None:
        due = self.batches % self.log_every == 0
        # Reading a number costs an accelerator its queue, so it is read every step on the CPU only.
        if not due and loss.is_cuda:
            return
        if not math.isfinite(loss.item()):
            found = [f"{name} {value.item():.4g}" for name, value in terms.items()] + broken_inputs(inputs)
            raise RunFailedError(f"loss not finite at step {self.global_step}: {', '.join(found)}\n{_REMEDY}")
        if due:
            points = {f"train/{name}": v.item() for name, v in terms.items()} if len(terms) > 1 else {}
            self.note(agreement.averages({"train/loss": loss.item(), **points}), self.global_step)

    # ---- evaluation

    def on_test_start(self) -> None:
        """Columns of the classes known by now; what a pass takes is counted anew where it may be another."""
        self.place_classes()
        another = self.then or self._answerer is not None or self._classifier is not None
        self.charges.forget(self.cost_varies(), None if another else len(self.ledger))

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Fold one batch of one experience's test data into scores and loads."""
        logits, targets, routings = self.answer(batch, batch_idx, dataloader_idx)
        sure = None if self.then else self.scoring.calibration(logits, targets)
        assert self.tally is not None
        self.tally.update(dataloader_idx, self.score(logits, targets), len(targets), routings, sure)
        self.between_tests()

    def answer(
        self, batch: tuple[Tensor, Tensor], batch_idx: int, test_set: int
    ) -> tuple[Tensor, Tensor, dict[int, Routing]]:
        """Logits, targets and routings of a batch of test data, charged as a pass of evaluation.

        Raises:
            RunFailedError: a logit is not finite.
        """
        inputs, targets = batch
        mask = padding_mask(targets) if self.kind == "language" else None
        inputs, targets = self.model.pose(inputs, targets, lambda: generator(0, "evaluation", batch_idx))
        varies = mask is not None or bool(self.then)
        step = self.charges.step("test", inputs, varies=varies, tokens=targets.numel())
        with watching(self.model, self.watched.get(test_set), self.charges.beside), step:
            with answering(self.model, self._classifier) as answer:
                logits, routings = self._ask(inputs, targets, mask, test_set)
            logits = answer(logits)
        if not logits.isfinite().all():  # an argmax over them would be a score like any other
            place = f"after step {self.global_step}, on test set {test_set}"
            raise RunFailedError(f"output not finite in an evaluation {place}\n{_REMEDY}")
        return logits, targets, routings

    def _ask(self, inputs: Tensor, targets: Tensor, mask: Tensor | None, test_set: int) -> Answer:
        def forward(cohorts: Sequence[int] | None) -> Answer:
            if self.then:
                return self.then[test_set].logits(self.model, inputs, mask, cohorts), {}
            return self.model(inputs, mask=mask, cohorts=cohorts)

        asker = self._answerer
        return forward(None) if asker is None else asker.answer(forward, inputs, self.scoring.tasks(targets))

    # ---- state

    def whole_state(self, inside: bool = False) -> dict[str, Any]:
        """Everything a restart needs, ledger first; tensors and plain Python only.

        Args:
            inside: between two steps of an experience; else at a boundary.
        """
        restart = {"batches": self.batches, "generators": generator_states()} if inside else None
        return {
            "ledger": self.ledger,
            "model": self.whole_weights(self.model),
            "optimizer": self.live_optimizer_state() if inside else self.optimizer_state,
            "optimizer_class": type(self.optimizer_spec).__name__,
            "strategies": {name: strategy.state_dict() for name, strategy in self.strategies.items()},
            "online": self.online.state_dict(),
            "trace": self.trace.state_dict(),
            "restart": restart,
        }

    def load_whole_state(self, state: Mapping[str, Any], convert: Callable[[Any], Any]) -> None:
        """Replay the ledger on a fresh model, ``convert`` that to what it computes in; then load all else."""
        self.ledger = list(state["ledger"])
        replay(self.model, self.ledger)
        convert(self)  # a fresh model, in float32, would cut weights in float64
        self.model.load_state_dict(state["model"])
        goes_on = state["restart"] or self.optimizer_spec.state == "carry"  # a branch may choose another
        same = state["optimizer_class"] == type(self.optimizer_spec).__name__
        self.optimizer_state = dict(state["optimizer"]) if same and goes_on else {}
        self._load_strategies(state["strategies"])
        self.online.load_state_dict(state["online"])
        self.trace.load_state_dict(state.get("trace"))
        self._restart = state["restart"] and {**state["restart"], "strategies": state["strategies"]}

    def _load_strategies(self, states: Mapping[str, Any]) -> None:
        for name, strategy in self.strategies.items():
            if name in states:
                strategy.load_state_dict(states[name])

    def cost_varies(self, training: bool = False) -> bool:
        """Whether a pass (``training``: and the way back) varies in cost for tensors of the same shapes."""
        layers = self.model.expert_layers.values() if training else ()
        partly = any(len(set(layer.frozen_cohorts)) > 1 for layer in layers)  # live experts have gradients
        return partly or any(getattr(part, "cost_varies", False) for part in self.model.modules())
