"""Not a test: runs of the program by several ranks, forked from a test, over gloo."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch
import torch.distributed as dist
from omegaconf import DictConfig
from torch import Tensor, multiprocessing

from cl_moe import agreement, launch, worker
from cl_moe.experiment import run_experiment
from cl_moe.run import Run

Change = Callable[[Run], None]


def among(size: int, work: Callable[..., None], *arguments: object, folder: Path) -> None:
    """Call ``work(*arguments)`` on so many ranks, each a fork of this process, in a process group."""
    shutil.rmtree(folder / "meeting", ignore_errors=True)
    (folder / "meeting").mkdir(parents=True)
    multiprocessing.start_processes(
        _rank, args=(size, folder / "meeting", work, arguments), nprocs=size, start_method="fork"
    )


def _rank(
    rank: int, size: int, meeting: Path, work: Callable[..., None], arguments: Sequence[object]
) -> None:
    numbers = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "GROUP_RANK": 0,
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": size,
    }
    os.environ |= {name: str(number) for name, number in numbers.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "test"}
    torch.set_num_threads(1)
    store = dist.FileStore(str(meeting / "store"), size)
    dist.init_process_group("gloo", rank=rank, world_size=size, store=store)
    agreement.join(meeting)
    with open(meeting / f"said_{rank}", "w") as said, redirect_stdout(said), redirect_stderr(said):
        try:
            work(*arguments)
        except BaseException as error:
            worker.note(meeting, rank, worker.describe(error))
            raise
    agreement.leave()
    dist.destroy_process_group()


def run(config: DictConfig, folder: Path, change: Change = lambda run: None) -> None:
    """One experiment; each rank leaves its matrix, its weights and how many steps it made."""
    config.output_dir = str(folder / "run")
    built = launch.build(config)
    change(built)
    run_experiment(built)
    left = {
        "matrix": built.measured.matrix,
        "weights": dict(built.learner.model.state_dict()),
        "ledger": built.learner.ledger,
        "steps": built.trainer.global_step,
        "frozen": [n for n, p in built.learner.model.named_parameters() if not p.requires_grad],
        "costs": built.cost.points(),
    }
    torch.save(left, folder / f"left_{agreement.rank()}.pt")


def results(folder: Path, size: int) -> list[dict[str, object]]:
    """What each rank left."""
    return [torch.load(folder / f"left_{rank}.pt") for rank in range(size)]


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Over all weights."""
    assert a.keys() == b.keys()
    return max((a[name].double() - b[name].double()).abs().max().item() for name in a if a[name].numel())
