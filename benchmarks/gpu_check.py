"""On a CUDA device: every layer against the CPU, the benches, and short experiments in bfloat16.

Where there is no such device it says so, and that nothing was checked; the exit status is then 0. Else it is
1 if a layer computes something else than on the CPU or an experiment fails. Ratios of the benches are
printed, not judged: their limits were set for a CPU.

    python benchmarks/gpu_check.py            # or: make gpu-check
    python benchmarks/gpu_check.py --device cpu    # a rehearsal: the same words on the CPU
"""

from __future__ import annotations

import argparse
import copy
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import moe_step
import torch
from torch import nn

from cl_moe.layers import PEER, PKM, DenseFFN, ExpertChoice, GShard, MoE, Switch, TopK

DIM = 64
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "dense": partial(DenseFFN, DIM, 128),
    "top_k": partial(MoE, DIM, 8, 32, TopK),
    "switch": partial(MoE, DIM, 8, 32, partial(Switch, jitter=0)),
    "gshard": partial(MoE, DIM, 8, 32, partial(GShard, second="all")),
    "expert_choice": partial(MoE, DIM, 8, 32, ExpertChoice),
    "peer": partial(PEER, DIM, 256, 2, 8),
    "pkm": partial(PKM, DIM, 256, 2, 8),
}
SHORT = ["stream=text_domains", "stream.domains=[novels_en,python_code]", "stream.context=64"]
SHORT += ["stream.train_bytes=20000", "stream.test_bytes=8192", "growth=every_experience"]
SHORT += ["freeze=past_experts", "trainer.precision=bf16-mixed", "tracking=none"]
EXPERIMENTS = {"moe": ["layer=moe", "router=top_k"], "peer": ["layer=peer"]}


def agrees(make: Callable[[], nn.Module], device: str) -> bool:
    """Whether a grown layer's output and gradients are those of the CPU, in float32 and to rounding."""
    torch.manual_seed(0)
    layer = make()
    if not isinstance(layer, DenseFFN):
        layer.freeze()
        layer.grow(256 if isinstance(layer, PEER | PKM) else 8)
    x, found = torch.randn(4, 32, DIM), []
    for place in ("cpu", device):
        one, leaf = copy.deepcopy(layer).to(place), x.detach().to(place).requires_grad_()
        out, routing = one(leaf)
        (out.square().sum() + sum(routing.losses.values())).backward()
        grads = [p.grad.cpu() for p in one.parameters() if p.grad is not None]
        found.append([out.detach().cpu(), leaf.grad.cpu(), *grads])
    pairs = zip(*found, strict=True)
    return all(torch.allclose(a, b, atol=1e-4, rtol=1e-3) for a, b in pairs)


def runs(words: list[str], accelerator: str) -> bool:
    """Whether an experiment ends well."""
    with tempfile.TemporaryDirectory() as folder:
        place = [f"trainer.accelerator={accelerator}", f"output_dir={folder}/run"]
        command = [sys.executable, "-m", "cl_moe", *SHORT, *words, *place]
        paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        return subprocess.run(command, cwd=folder, check=False, env=environment).returncode == 0


def main(*words: str) -> int:
    """Print what was checked. Returns 1 if something failed, else 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--repetitions", type=int, default=15)
    options = parser.parse_args(words)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("gpu-check: there is no CUDA device here, so nothing was checked")
        return 0
    name = torch.cuda.get_device_name() if options.device == "cuda" else "the CPU, as a rehearsal"
    print(f"gpu-check: {name}, torch {torch.__version__}")
    torch.backends.cuda.matmul.allow_tf32 = False
    failed = [f"layer {name}" for name, make in LAYERS.items() if not agrees(make, options.device)]
    moe_step.main(
        "--device", options.device, "--dtype", "bfloat16", "--repetitions", str(options.repetitions)
    )
    accelerator = "gpu" if options.device == "cuda" else "cpu"
    failed += [f"experiment {name}" for name, words in EXPERIMENTS.items() if not runs(words, accelerator)]
    print(f"gpu-check: {', '.join(failed)} failed" if failed else "gpu-check: all passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
