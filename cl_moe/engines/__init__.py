"""How several processes train one model: the ``engine`` of a trainer."""

from cl_moe.engines.base import BACKENDS, Device, Engine
from cl_moe.engines.ddp import DDP
from cl_moe.engines.fsdp import FSDP
from cl_moe.engines.pieces import bytes_remembered, clip, gather, optimizer_state, weights
from cl_moe.engines.zero import DeepSpeed

__all__ = [
    "BACKENDS",
    "DDP",
    "FSDP",
    "DeepSpeed",
    "Device",
    "Engine",
    "bytes_remembered",
    "clip",
    "gather",
    "optimizer_state",
    "weights",
]
