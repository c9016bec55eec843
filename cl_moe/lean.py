"""A LightningModule without costs and refusals that this program has no use for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import lightning as L  # noqa: N812
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from cl_moe import agreement, engines
from cl_moe.batches import evaluation_loader
from cl_moe.counting import Charges
from cl_moe.counting.charges import Account
from cl_moe.metrics import Tally
from cl_moe.models.rewind import RouterState
from cl_moe.models.watching import Seen
from cl_moe.optim import OptimizerState, forget_part


class LeanModule(L.LightningModule):
    """Abstract: a learner's part that speaks of Lightning: its hooks, its engines, its passes over test sets.

    Attributes:
        batches: of this experience that were trained.
        first_pass: batches of one pass through it.
        epochs: passes through it.
        tick: called after every batch.
        between_steps: called between two optimizer steps.
        between_tests: called after every batch of an evaluation.
        charges: what passes take.
        tally: takes up the answers of the evaluation that is under way.
        then: the router with which each of its test sets is met; empty: that of now.
        watched: what takes up what is seen of the model on some of its test sets.
    """

    def __init__(self) -> None:
        super().__init__()
        self.batches, self.first_pass, self.epochs = 0, 0, 1
        self.tick, self.between_steps, self.between_tests = _nothing, _nothing, _nothing
        self.charges = Charges()
        self.tally: Tally | None = None
        self.then: list[RouterState] = []
        self.watched: dict[int, Seen] = {}

    def __setattr__(self, name: str, value: Any) -> None:
        # Lightning notes the name of the running hook some 46 times in a step, and a module's own way of
        # setting attributes, which looks for tensors, makes that a twentieth of a small network's step.
        if name == "_current_fx_name":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def accumulate(self) -> int:
        """Batches per optimizer step; 1 before there is a Trainer."""
        return int(self.trainer.accumulate_grad_batches) if self._trainer is not None else 1

    def steps(self) -> tuple[int, int]:
        """Optimizer steps made in this experience, and to be made; the last one of a pass may be shorter.

        They hang on the number of batches alone, so that a restart counts the same.
        """
        per_pass = -(-self.first_pass // self.accumulate)
        passes, batch = divmod(self.batches, self.first_pass)
        return passes * per_pass + batch // self.accumulate, self.epochs * per_pass

    def forget(self, parameter: Tensor, part: Any) -> None:
        """Of a part of a parameter (an index into it) the optimizer forgets all: it was drawn anew."""
        forget_part(self.trainer.optimizers[0].state.get(parameter, {}), parameter.shape, part)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Experiences lie in CPU memory: on the CPU there is nothing to look through and to move.

        Of a training batch among ranks, each moves its own part, once strategies have added to the whole.
        """
        if device.type == "cpu" or (self.trainer.training and agreement.num_ranks() > 1):
            return batch
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by norm; Lightning refuses a fused optimizer in bf16-mixed, though nothing is scaled there."""
        if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_val:
            held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            engines.clip(self.trainer, held, gradient_clip_val)

    def gather(self) -> None:
        """Put the model together again, if an engine has taken it to pieces."""
        engines.gather(self.trainer)

    def whole_weights(self, model: nn.Module) -> dict[str, Any]:
        """A model's state, whole; in pieces or not.

        No trainer has it yet where an open stream is saved before its first experience.
        """
        return model.state_dict() if self._trainer is None else engines.weights(self.trainer, model)

    def live_optimizer_state(self) -> OptimizerState:
        """What the optimizer of the fit that is under way remembers, by name, whole."""
        return engines.optimizer_state(self.trainer, self.named_parameters())

    def go_over(
        self,
        trainer: L.Trainer,
        tally: Tally,
        test_sets: Iterable[TensorDataset],
        batch_size: int,
        account: Account = "eval",
        then: Sequence[RouterState] = (),
        watched: Mapping[int, Seen] | None = None,
    ) -> None:
        """Answer test sets as it is now, in one pass.

        Args:
            trainer: of the stream.
            tally: takes up scores, loads and choices of each test set.
            test_sets: at least one.
            batch_size: examples per evaluation batch.
            account: that the pass is charged to.
            then: the router with which each test set is to be met; none: that of now.
            watched: what takes up what is seen of the model on a test set, by the set's place.
        """
        self.tally, self.then, self.watched = tally, list(then), dict(watched or {})
        with self.charges.account(account):
            loaders = [evaluation_loader(data, batch_size) for data in test_sets]
            trainer.test(self, dataloaders=loaders, verbose=False)
        self.then, self.watched = [], {}

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


def scale_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Let the next step go at a factor of the rate that the optimizer was built with."""
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("base_lr", group["lr"]) * factor


def _nothing() -> None:
    """What nobody asked for."""
