"""How long and on what to train: the ``trainer`` group of the configuration."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import lightning as L  # noqa: N812
import torch
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException

from cl_moe.engines import Device, Engine
from cl_moe.errors import InputError
from cl_moe.stream import Stream

PRECISIONS = ("32-true", "bf16-mixed", "64-true")


class _Trainer(L.Trainer):
    """Leaves SIGTERM to ``stopping``; Lightning's own way skips hooks at an epoch's end and saves nothing.

    Among ranks its handler waits for all of them inside the signal, wherever each of them stands: for ever.
    """

    received_sigterm = False

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]


class TrainerSpec:
    """Builds the one Trainer that serves a whole stream.

    Args:
        epochs: passes over each experience.
        batch_size: new examples per step; the last batch of an epoch may be smaller.
        eval_batch_size: examples per evaluation batch.
        accelerator: ``auto`` takes a GPU where there is one; ``cpu``, ``gpu``, ``mps``.
        devices: processes on each machine, each with a device of its own; ``batch_size`` is split among all.
        num_nodes: machines; each runs the same command.
        rendezvous: ``host:port`` of one of them, where they meet.
        engine: how several processes train one model; None for one process.
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
        num_nodes: int = 1,
        rendezvous: str | None = None,
        engine: Engine | None = None,
    ) -> None:
        counts = {
            "devices": devices,
            "num_nodes": num_nodes,
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
        allowed = PRECISIONS if engine is None else engine.precisions
        if precision not in allowed:
            raise InputError(
                got=f"precision={precision}", allowed=", ".join(allowed), key="trainer.precision"
            )
        if engine is None and devices * num_nodes != 1:
            raise InputError(
                got=f"devices={devices}, num_nodes={num_nodes} with trainer=auto",
                allowed="1 of each, or trainer=ddp",
                key="trainer (or trainer.devices)",
            )
        if (num_nodes > 1) != (rendezvous is not None):
            raise InputError(
                got=f"num_nodes={num_nodes} and rendezvous={rendezvous}",
                allowed="host:port of one of several machines, and null for one",
                key="trainer.rendezvous (or trainer.num_nodes)",
            )
        self.epochs, self.batch_size, self.eval_batch_size = epochs, batch_size, eval_batch_size
        self.accelerator, self.devices, self.precision = accelerator, devices, precision
        self.threads, self.gradient_clip = threads, gradient_clip
        self.accumulate, self.log_every = accumulate, log_every
        self.stall_minutes = stall_minutes
        self.num_nodes, self.rendezvous, self.engine = num_nodes, rendezvous, engine

    @property
    def num_ranks(self) -> int:
        """Processes that train together."""
        return self.devices * self.num_nodes

    @property
    def device(self) -> Device:
        """What the ranks compute on.

        Raises:
            InputError: there are too few of them.
        """
        if self.accelerator == "cpu" or (self.accelerator == "auto" and not torch.cuda.is_available()):
            return "cpu"
        if self.accelerator not in ("auto", "gpu", "cuda") or torch.cuda.device_count() < self.devices:
            raise InputError(
                got=f"devices={self.devices} of accelerator={self.accelerator}",
                allowed=f"cpu, or gpu with at most {torch.cuda.device_count()} devices on this machine",
                key="trainer.devices (or trainer.accelerator)",
            )
        return "cuda"

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
                num_nodes=self.num_nodes,
                **self._among_ranks(),
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

    def _among_ranks(self) -> dict[str, Any]:
        if self.engine is None or self.num_ranks == 1:
            return {"precision": self.precision}
        given = self.engine.precision(self.precision, self.device)
        # named, since under SLURM Lightning would take the scheduler's ranks for ours
        plugins = [TorchElasticEnvironment(), *given.pop("plugins", [])]
        return {"strategy": self.engine.strategy(self.device), "plugins": plugins, **given}

    def raise_epochs(self, trainer: L.Trainer) -> None:
        """Let the next fit train: without this a second fit of the same Trainer trains nothing, silently."""
        assert trainer.fit_loop.max_epochs is not None
        trainer.fit_loop.max_epochs += self.epochs

    def num_steps(self, stream: Stream) -> list[int]:
        """Batches to be trained in each experience."""
        return [self.epochs * -(-len(experience.train) // self.batch_size) for experience in stream]
