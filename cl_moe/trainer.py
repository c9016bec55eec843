"""How long and on what to train: the ``trainer`` group of the configuration."""

from __future__ import annotations

import logging
import warnings

import lightning as L  # noqa: N812
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from cl_moe.errors import InputError
from cl_moe.stream import Stream

PRECISIONS = ("32-true", "bf16-mixed", "64-true")


class _Trainer(L.Trainer):
    """Leaves SIGTERM to ``stopping``; Lightning's own way skips hooks at an epoch's end and saves nothing."""

    received_sigterm = False


class TrainerSpec:
    """Builds the one Trainer that serves a whole stream.

    Args:
        epochs: passes over each experience.
        batch_size: new examples per step; the last batch of an epoch may be smaller.
        eval_batch_size: examples per evaluation batch.
        accelerator: ``auto`` takes a GPU where there is one; ``cpu``, ``gpu``, ``mps``.
        devices: how many; one in this version.
        precision: as Lightning names it: ``32-true``, ``bf16-mixed`` (weights in float32), ``64-true``.
        threads: torch's CPU threads; fixed, since another number changes the bits.
        gradient_clip: largest gradient norm; None for no clipping.
        accumulate: batches per optimizer step.
        log_every: optimizer steps between two points of ``train/*``.
        stall_minutes: without a finished batch of training or evaluation after which the run counts as hung
            and fails; None: never.
    """

    def __init__(
        self,
        epochs: int = 1,
        batch_size: int = 32,
        eval_batch_size: int = 256,
        accelerator: str = "auto",
        devices: int = 1,
        precision: str = "32-true",
        threads: int = 1,
        gradient_clip: float | None = None,
        accumulate: int = 1,
        log_every: int = 20,
        stall_minutes: float | None = 30.0,
    ) -> None:
        counts = {
            "epochs": epochs,
            "batch_size": batch_size,
            "eval_batch_size": eval_batch_size,
            "threads": threads,
            "accumulate": accumulate,
            "log_every": log_every,
        }
        for name, value in counts.items():
            if not isinstance(value, int) or value < 1:
                raise InputError(
                    got=f"{name}={value!r}", allowed="a whole number, at least 1", key=f"trainer.{name}"
                )
        if stall_minutes is not None and not stall_minutes > 0:
            raise InputError(
                got=f"stall_minutes={stall_minutes}", allowed="above 0, or null", key="trainer.stall_minutes"
            )
        if gradient_clip is not None and not gradient_clip > 0:
            raise InputError(
                got=f"gradient_clip={gradient_clip}", allowed="above 0, or null", key="trainer.gradient_clip"
            )
        if precision not in PRECISIONS:
            raise InputError(
                got=f"precision={precision}", allowed=", ".join(PRECISIONS), key="trainer.precision"
            )
        if devices != 1:
            raise InputError(got=f"devices={devices}", allowed="1 with trainer=auto", key="trainer.devices")
        self.epochs, self.batch_size, self.eval_batch_size = epochs, batch_size, eval_batch_size
        self.accelerator, self.devices, self.precision = accelerator, devices, precision
        self.threads, self.gradient_clip = threads, gradient_clip
        self.accumulate, self.log_every = accumulate, log_every
        self.stall_minutes = stall_minutes

    def build(self) -> L.Trainer:
        """The Trainer, with its chatter silenced: what we need to say, we say once ourselves."""
        torch.set_num_threads(self.threads)
        logging.getLogger("lightning").setLevel(logging.WARNING)
        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
        warnings.filterwarnings("ignore", "The '.*_dataloader' does not have many workers")
        warnings.filterwarnings("ignore", ".*isinstance\\(treespec, LeafSpec\\).*")
        # After a restart inside an epoch the sampler passes over what was trained: see ``Order.begin_at``.
        warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before the epoch")
        try:
            return _Trainer(
                max_epochs=0,  # raised before each fit: see ``raise_epochs``
                accelerator=self.accelerator,
                devices=self.devices,
                precision=self.precision,  # type: ignore[arg-type]
                gradient_clip_val=self.gradient_clip,
                accumulate_grad_batches=self.accumulate,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                num_sanity_val_steps=0,
                use_distributed_sampler=False,
            )
        except (ValueError, MisconfigurationException) as error:
            raise InputError(
                got=f"accelerator={self.accelerator}: {error}",
                allowed="auto, or what this machine has of cpu, gpu, mps",
                key="trainer.accelerator",
            ) from error

    def raise_epochs(self, trainer: L.Trainer) -> None:
        """Let the next fit train: without this a second fit of the same Trainer trains nothing, silently."""
        assert trainer.fit_loop.max_epochs is not None
        trainer.fit_loop.max_epochs += self.epochs

    def num_steps(self, stream: Stream) -> list[int]:
        """Batches to be trained in each experience."""
        return [self.epochs * -(-len(experience.train) // self.batch_size) for experience in stream]
