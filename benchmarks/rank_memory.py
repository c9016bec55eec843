"""Bytes that each of two ranks holds while it trains, and seconds of a step, under every engine.

A mixture of 64 experts (34 MB of weights in float32) with AdamW on split digits, two ranks on one machine's
CPUs. Counted are all tensors that Python knows of, each storage once, less the stream's data: between a
backward pass and its step (weights, gradients, optimizer state, buffers of the exchange) and between steps
(without gradients). What an engine should hold at least stands beside it: with W bytes of weights on n ranks,
ddp holds W + W + 2 W, stage 1 W + W + 2 W / n, stage 2 W + W / n + 2 W / n, stage 3 and fsdp 4 W / n.

The efficiency is that of the steps behind those that are counted, medians: seconds of one process, over
n x seconds of n processes at the same batch (all examples of two digits), each with one thread.

    python benchmarks/rank_memory.py
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

RANKS, STEPS = 2, 3
ALONE = "one process"
ENGINES = {
    ALONE: (),
    "ddp": ("trainer=ddp",),
    "fsdp": ("trainer=fsdp",),
    "fsdp, tensor_parallel=2": ("trainer=fsdp", "trainer.engine.tensor_parallel=2"),
    "deepspeed, stage 1": ("trainer=deepspeed", "trainer.engine.stage=1"),
    "deepspeed, stage 2": ("trainer=deepspeed", "trainer.engine.stage=2"),
    "deepspeed, stage 3": ("trainer=deepspeed", "trainer.engine.stage=3"),
}
SHOULD = {
    ALONE: 4.0,
    "ddp": 4.0,
    "fsdp": 4 / RANKS,
    "fsdp, tensor_parallel=2": 4 / RANKS,
    "deepspeed, stage 1": 2 + 2 / RANKS,
    "deepspeed, stage 2": 1 + 3 / RANKS,
    "deepspeed, stage 3": 4 / RANKS,
}
MODEL = (
    *("layer=moe", "layer.num_experts=64", "layer.hidden=256", "model.width=256", "optimizer=adamw"),
    *(
        "stream.tune_on_first=1",
        "trainer.epochs=15",
        "trainer.batch_size=512",
        "tracking=none",
        "eval.samples=0",
        "trainer.accelerator=cpu",
    ),
)


def held() -> int:
    """Bytes of all storages behind tensors."""
    import torch

    gc.collect()
    sizes = {}
    for found in gc.get_objects():
        if not issubclass(type(found), torch.Tensor):
            continue
        for one in (found, found.grad if found.is_leaf else None):  # Python may not know of a gradient
            local = one.to_local() if hasattr(one, "to_local") else one
            if local is not None and local.layout == torch.strided and local.device.type == "cpu":
                storage = local.untyped_storage()
                sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def rank(config_file: str, *overrides: str) -> None:
    """One rank: count in the third step what is held, time the others behind it, and write both."""
    import torch
    import torch.distributed as dist
    from hydra import compose, initialize_config_module
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import open_dict

    from cl_moe import agreement, launch
    from cl_moe.experiment import fit, grow_and_freeze

    torch.set_num_threads(1)
    with initialize_config_module("conf", version_base="1.3"):
        config = compose("config", [*MODEL, *overrides], return_hydra_config=True)
    HydraConfig.instance().set_config(config)
    with open_dict(config):
        del config["hydra"]
    if int(os.environ["WORLD_SIZE"]) > 1:
        dist.init_process_group("gloo")
        agreement.join()
    before = held()
    run = launch.build(config)
    run.learner.between_steps = lambda: None
    data = held() - before - sum(p.numel() * p.element_size() for p in run.learner.parameters())
    numbers, ends = dict[str, float](), list[float]()
    step, tick = run.learner.on_before_optimizer_step, run.learner.tick

    def stepping(optimizer: torch.optim.Optimizer) -> None:
        step(optimizer)
        if run.learner.batches == STEPS - 1:
            numbers["backward"] = held() - before - data

    def ticking() -> None:
        tick()
        if run.learner.batches == STEPS:
            run.learner.zero_grad()
            numbers["between"] = held() - before - data
        if run.learner.batches >= STEPS:
            ends.append(time.perf_counter())

    run.learner.on_before_optimizer_step, run.learner.tick = stepping, ticking  # type: ignore[method-assign]
    experience = run.training_stream[0]
    grow_and_freeze(run, experience)
    numbers["weights"] = sum(p.numel() * p.element_size() for p in run.learner.parameters())
    fit(run, experience)
    numbers["seconds"] = statistics.median(after - before for before, after in pairwise(ends))
    if agreement.is_first():
        Path(config_file).write_text(json.dumps(numbers))
    os._exit(0)


def measure(name: str, folder: Path) -> dict[str, float]:
    """Both ranks of one engine, or one process."""
    place, ranks = folder / "numbers.json", 1 if name == ALONE else RANKS
    words = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    words += [
        "--nproc-per-node",
        str(ranks),
        __file__,
        str(place),
        *ENGINES[name],
        f"trainer.devices={ranks}",
        f"output_dir={folder}/run",
    ]
    where = dict(os.environ, OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")
    where["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    subprocess.run(words, check=True, env=where, stdout=subprocess.DEVNULL)
    return json.loads(place.read_text())


def main() -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"MB held by each of {RANKS} ranks, and as shares of the weights W")
    columns = ("engine", "before a step", "of W", "at least", "between steps", "of W", "ms", "efficiency")
    alone = 0.0
    for column in columns:
        table.add_column(column, justify="left" if column == "engine" else "right")
    for name in ENGINES:
        if name.startswith("deepspeed") and importlib.util.find_spec("deepspeed") is None:
            table.add_row(name, "the extra is absent")
            continue
        with tempfile.TemporaryDirectory() as folder:
            numbers = measure(name, Path(folder))
        whole = numbers["weights"]
        cells = [
            f"{numbers['backward'] / 1e6:.1f}",
            f"{numbers['backward'] / whole:.2f}",
            f"{SHOULD[name]:.2f}",
        ]
        cells += [f"{numbers['between'] / 1e6:.1f}", f"{numbers['between'] / whole:.2f}"]
        alone = alone or numbers["seconds"]
        gained = "" if name == ALONE else f"{alone / numbers['seconds'] / RANKS:.2f}"
        cells += [f"{1000 * numbers['seconds']:.0f}", gained]
        table.add_row(name, *cells)
    Console(width=120).print(table)


if __name__ == "__main__":
    rank(*sys.argv[1:]) if len(sys.argv) > 1 else main()
