"""Whether a forward pass is one done again for its gradients, by activation checkpointing."""

from __future__ import annotations

import torch


def recomputing() -> bool:
    """Whether the autograd engine runs: what happens once per batch must not happen in a pass inside it.

    torch has no public name for this; compiled code is not asked.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
