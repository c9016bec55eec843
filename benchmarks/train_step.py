"""CPU time per training iteration of split digits: cl-moe, bare Lightning, a bare PyTorch loop.

The same network (64-256-256, head growing by two classes), data, batch size, optimizer and order everywhere;
plain fine-tuning; cl-moe with logging into MLflow on. Evaluation, which only cl-moe does, is left out of all.
Repetitions are interleaved, so that a change of the machine's speed meets all three; the ratio is the median
of the repetitions' ratios.

    python benchmarks/train_step.py [repetitions]
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import lightning as L  # noqa: N812
import torch
from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from omegaconf import open_dict
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from cl_moe import launch
from cl_moe.batches import training_loader
from cl_moe.experiment import fit, grow_and_freeze, measure
from cl_moe.run import Run
from cl_moe.stream import Experience, Stream
from tasks.split_digits import split_digits

EPOCHS, BATCH, LR = 10, 32, 0.1
LIMITS = {"bare Lightning": 1.2, "bare PyTorch loop": 2.5}


def network(num_classes: int) -> nn.Sequential:
    """The peers' network, as large as it is after the given number of classes."""
    return nn.Sequential(
        nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, num_classes)
    )


def loaders(stream: Stream) -> list[tuple[Experience, torch.utils.data.DataLoader]]:
    """The loader that cl-moe uses, for every contender."""
    return [(e, training_loader(e.train, BATCH, 0, e.index)) for e in stream]


def bare_loop(stream: Stream) -> float:
    """CPU seconds of a plain PyTorch loop over the stream."""
    batches = loaders(stream)
    start = time.process_time()
    for experience, loader in batches:
        model = network(2 * (experience.index + 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        for epoch in range(EPOCHS):
            loader.sampler.set_epoch(epoch)
            for inputs, targets in loader:
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(inputs), targets).backward()
                optimizer.step()
    return time.process_time() - start


class Bare(L.LightningModule):
    """The least a LightningModule can be."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.model = network(num_classes)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        inputs, targets = batch
        return nn.functional.cross_entropy(self.model(inputs), targets)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD."""
        return torch.optim.SGD(self.parameters(), lr=LR)


def bare_lightning(stream: Stream) -> float:
    """CPU seconds of one Trainer fitting each experience in turn, nothing logged."""
    batches = loaders(stream)
    trainer = L.Trainer(
        max_epochs=0,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    start = time.process_time()
    for experience, loader in batches:
        trainer.fit_loop.max_epochs += EPOCHS
        trainer.fit(Bare(2 * (experience.index + 1)), train_dataloaders=loader)
    return time.process_time() - start


def ours(folder: Path) -> Callable[[Stream], float]:
    """CPU seconds of cl-moe's adapting, fitting and sending of points."""
    store = f"tracking.uri=sqlite:///{folder / 'mlflow.db'}"

    def timed(stream: Stream) -> float:
        with tempfile.TemporaryDirectory(dir=folder) as output:
            run = build([store, f"output_dir={output}", "trainer.accelerator=cpu"])
            seconds = 0.0
            with run.open():
                run.resume()
                measure(run)
                for experience in run.training_stream:
                    start = time.process_time()
                    grow_and_freeze(run, experience)
                    fit(run, experience)
                    run.tracker.send()
                    seconds += time.process_time() - start
                    measure(run)
        return seconds

    return timed


def build(overrides: list[str]) -> Run:
    """A run as the command line would build it."""
    with initialize_config_module("conf", version_base="1.3"):
        config = compose("config", overrides, return_hydra_config=True)
        HydraConfig.instance().set_config(config)
        with open_dict(config):
            del config["hydra"]
        return launch.build(config)


def main(repetitions: int = 7) -> int:
    """Print the table; a ratio over its limit is red. Returns 1 if there is one, else 0."""
    torch.set_num_threads(1)
    stream = split_digits()
    iterations = sum(EPOCHS * len(loader) for _, loader in loaders(stream))
    with tempfile.TemporaryDirectory() as folder:
        contenders = {
            "cl-moe": ours(Path(folder)),
            "bare Lightning": bare_lightning,
            "bare PyTorch loop": bare_loop,
        }
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for repetition in range(repetitions + 1):
            for name, contender in contenders.items():
                seconds = contender(stream)
                if repetition:  # the first round warms up
                    times[name].append(seconds / iterations * 1000)
    medians, fine = {name: statistics.median(values) for name, values in times.items()}, True
    table = Table(
        title=f"split digits, naive, batch {BATCH}: CPU ms per iteration, {repetitions} repetitions"
    )
    for column in ("", "median", "min", "max", "cl-moe is", "at most"):
        table.add_column(column, justify="left" if not column else "right")
    for name, median in medians.items():
        pairs = zip(times["cl-moe"], times[name], strict=True)
        ratio, limit = statistics.median(ours / theirs for ours, theirs in pairs), LIMITS.get(name)
        fine &= limit is None or ratio <= limit
        table.add_row(
            name,
            *(f"{value:.3f}" for value in (median, min(times[name]), max(times[name]))),
            f"[{'red' if ratio > limit else 'green'}]{ratio:.2f}x" if limit else "",
            f"{limit}x" if limit else "",
        )
    Console().print(table)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main(*(int(word) for word in sys.argv[1:2])))
