import os

import torch
import torch.distributed as dist
from torch import multiprocessing, nn

from cl_moe.layers import (
    PEER,
    Capacity,
    ExpertChoice,
    GShard,
    MixtureOfDepths,
    MoE,
    Scores,
    StepLoads,
    Switch,
    TopK,
)

ROUTERS = {
    "switch": lambda dim: Switch(dim, jitter=0, balance=1.0),
    "top_k": TopK,
    "z_loss": lambda dim: TopK(dim, 2, balance=1.0, z_loss=1.0),
    "sigmoid": lambda dim: TopK(dim, 2, balance=1.0, scores=Scores("sigmoid")),
    "loss_free": lambda dim: TopK(dim, 2, scores=Scores("sigmoid", 1e-3)),
    "gshard": lambda dim: GShard(
        dim, second="all", balance=1.0, z_loss=1.0, capacity=Capacity(1.0, min_slots=1)
    ),
    "gshard, loss-free": lambda dim: GShard(dim, second="all", scores=Scores("softmax", 1e-3)),
    "expert_choice": lambda dim: ExpertChoice(dim, capacity_factor=1.0, z_loss=1.0),
}
NAMES = (*ROUTERS, "shared", "depth", "peer")


class Plain(nn.Module):
    """A residual block for Mixture-of-Depths that holds experts."""

    def __init__(self):
        super().__init__()
        self.experts = MoE(8, 4, 8, ROUTERS["top_k"])

    def forward(self, x, mask=None):
        out, routing = self.experts(x, mask=mask)
        return x + out, routing


def losses(layer, x):
    out, routing = layer(x)
    loads = StepLoads()
    if not isinstance(layer, MixtureOfDepths):
        loads.add({0: layer}, {0: routing})
        loads.apply({0: layer})  # moves a buffer, which the test compares
    # a mean over tokens, so that the average over ranks of the ranks' losses is the loss of the whole batch
    return out.square().mean() + sum(routing.losses.values())


def build(name):
    torch.manual_seed(0)
    if name == "peer":
        return PEER(8, 16, heads=2, k=3)
    if name == "depth":
        return MixtureOfDepths(Plain(), 8, capacity=0.5)
    if name == "shared":
        return MoE(8, 4, 8, ROUTERS["top_k"], num_shared=2)
    return MoE(8, 4, 8, ROUTERS[name])


def work(rank, folder):
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, "store"), 2)
    dist.init_process_group("gloo", rank=rank, world_size=2, store=store)
    x = torch.load(os.path.join(folder, "x.pt"))
    results = {}
    for name in NAMES:
        layer = build(name)
        losses(layer, x[rank * 3 : rank * 3 + 3]).backward()
        for parameter in layer.parameters():
            dist.all_reduce(parameter.grad)
            parameter.grad /= 2
        results[name] = [p.grad for p in layer.parameters()], list(layer.buffers())
    torch.save(results, os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def test_two_ranks_learn_what_one_learns_from_the_whole_batch(tmp_path):
    x = torch.randn(6, 5, 8)
    torch.save(x, tmp_path / "x.pt")
    multiprocessing.start_processes(work, args=(str(tmp_path),), nprocs=2, start_method="fork")
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name in NAMES:
        layer = build(name)
        losses(layer, x).backward()
        for rank in ranks:
            gradients, buffers = rank[name]
            for ours, parameter in zip(gradients, layer.parameters(), strict=True):
                torch.testing.assert_close(ours, parameter.grad, atol=1e-6, rtol=1e-4)
            for ours, buffer in zip(buffers, layer.buffers(), strict=True):
                torch.testing.assert_close(ours, buffer)
        if "free" in name:
            assert layer.cohorts[0].selection_bias.abs().max() > 0, "balanced at all"
