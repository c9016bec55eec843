"""The torchmetrics shells: any split over batches, states and ranks gives what one formula over all gives."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes

from cl_moe.errors import InputError
from cl_moe.layers.routing import ExpertLoad, Routing, fold_load
from cl_moe.metrics import ExperienceScores, ExpertLoads


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def scores_of(num_experiences, seed=0):
    """For every experience, scores of 0 to 20 examples; one experience has none."""
    random = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 20, (num_experiences,), generator=random)
    sizes[num_experiences // 2] = 0
    return [torch.rand(int(size), generator=random, dtype=torch.float64) for size in sizes]


def routing_of(tokens, experts, k, seed):
    random = torch.Generator().manual_seed(seed)
    expert = torch.randint(0, experts, (tokens, k), generator=random)
    kept = torch.rand(tokens, k, generator=random) < 0.8
    return Routing(expert, torch.rand(tokens, k, generator=random) * kept, kept, tokens, experts)


def test_scores_do_not_depend_on_the_split():
    data = scores_of(5)
    metric = ExperienceScores(5)
    for experience, scores in enumerate(data):
        for batch in scores.split(3):
            metric.update(experience, batch.sum(), len(batch))
    row = metric.compute()
    assert row.dtype == torch.float64
    assert row.shape == (5,)
    torch.testing.assert_close(row, torch.stack([scores.mean() for scores in data]), equal_nan=True)
    assert row[2].isnan()


def test_merged_scores_equal_one_metric():
    data = scores_of(4)
    whole, parts = ExperienceScores(4), [ExperienceScores(4), ExperienceScores(4)]
    for experience, scores in enumerate(data):
        for place, score in enumerate(scores):
            whole.update(experience, score, 1)
            parts[place % 3 == 0].update(experience, score, 1)  # uneven on purpose
    parts[0].merge_state(parts[1])
    torch.testing.assert_close(parts[0].compute(), whole.compute(), equal_nan=True, rtol=0, atol=1e-15)


def test_one_experience_still_gives_a_row():
    metric = ExperienceScores(1)
    metric.update(0, torch.tensor(3.0), 4)
    assert metric.compute().tolist() == [0.75]
    assert metric.compute().shape == (1,)
    metric.reset()
    metric.update(0, -2.0, torch.tensor(4))
    assert pickle.loads(pickle.dumps(metric)).compute().tolist() == [-0.5]


def test_bad_indices_are_refused():
    for bad in (-1, 2):
        with pytest.raises(InputError, match="experience"):
            ExperienceScores(2).update(bad, 1.0, 1)
        with pytest.raises(InputError, match="experience"):
            ExpertLoads(2).update(bad, {})
    with pytest.raises(InputError, match="num_experiences"):
        ExperienceScores(0)
    with pytest.raises(InputError, match="num_experiences"):
        ExpertLoads(0)


@pytest.mark.parametrize("known", [{1: 6, 3: 1}, None])
def test_loads_equal_one_fold_over_everything(known):
    metric, halves = ExpertLoads(2, known), [ExpertLoads(2, known), ExpertLoads(2, known)]
    expected = {1: [None, None], 3: [None, None]}
    for batch in range(6):
        experience = batch % 2
        loads = {
            1: fold_load(routing_of(5 + batch, 6, 2, batch)),
            3: fold_load(routing_of(3 + batch, 1, 1, 50 + batch)),
        }
        metric.update(experience, loads)
        halves[batch // 2 % 2].update(experience, loads)
        for block, load in loads.items():
            before = expected[block][experience]
            expected[block][experience] = load if before is None else before.merge(load)
    halves[0].merge_state(halves[1])
    for found in (metric.compute(), halves[0].compute()):
        assert found.keys() == expected.keys()
        for block, row in expected.items():
            for load, other in zip(found[block], row, strict=True):
                torch.testing.assert_close(load.score, other.score, rtol=0, atol=1e-12)
                assert torch.equal(load.count, other.count)
                assert torch.equal(load.kept, other.kept)
                assert load.score.shape == load.count.shape == other.count.shape
                assert load.kept.shape == ()


def test_loads_of_an_experience_never_seen_are_zero():
    metric = ExpertLoads(3, {0: 4})
    metric.update(1, {0: ExpertLoad(torch.ones(4).double(), torch.ones(4).long(), torch.tensor(4))})
    first, second, third = metric.compute()[0]
    assert first.count.sum() == third.count.sum() == 0
    assert second.count.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize(("known", "size"), [({0: 4}, 5), ({1: 4}, 4)])
def test_a_load_of_another_model_is_refused(known, size):
    load = ExpertLoad(torch.ones(size).double(), torch.ones(size).long(), torch.tensor(size))
    with pytest.raises(InputError, match="loads"):
        ExpertLoads(2, known).update(0, {0: load})


def _rank(rank, port, queue):
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    scores, loads = ExperienceScores(3), ExpertLoads(3, {0: 4})
    for batch in range(3 + 2 * rank):  # ranks see different numbers of examples
        scores.update(batch % 2, 1.0 + rank, 2 + rank)
        loads.update(batch % 2, {0: fold_load(routing_of(4, 4, 2, 10 * rank + batch))})
    row, load = scores.compute(), loads.compute()[0][0]
    if rank == 0:
        queue.put((row.tolist(), load.score.tolist(), load.count.tolist(), int(load.kept)))
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # fork in a process with threads
def test_two_ranks_sum_before_they_divide(free_port_number):
    context = torch.multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    start_processes(_rank, args=(free_port_number, queue), nprocs=2, start_method="fork")
    row, score, count, kept = queue.get()
    # Rank 0: batches 0, 1, 2 of (1, 2); rank 1: batches 0 .. 4 of (2, 3).
    assert row[:2] == [(2 * 1 + 3 * 2) / (2 * 2 + 3 * 3), (1 * 1 + 2 * 2) / (1 * 2 + 2 * 3)]
    assert row[2] != row[2]
    whole = [fold_load(routing_of(4, 4, 2, seed)) for seed in (0, 2, 10, 12, 14)]
    torch.testing.assert_close(torch.tensor(score).double(), sum(load.score for load in whole))
    assert count == sum(load.count for load in whole).tolist()
    assert kept == int(sum(load.kept for load in whole))


@pytest.fixture
def free_port_number():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_the_formulas_need_torch_alone():
    """Importing them brings in neither torchmetrics nor lightning."""
    code = (
        "import sys, cl_moe.metrics.functional; "
        "sys.exit(any(name in sys.modules for name in ('torchmetrics', 'lightning', 'matplotlib', 'pandas')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
