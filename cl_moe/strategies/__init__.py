"""What resists forgetting in data, loss or gradient. One file per strategy; they compose as a list."""

from cl_moe.strategies.base import Outlook, Step, Strategy
from cl_moe.strategies.cumulative import Cumulative
from cl_moe.strategies.distill_from import DistillFrom
from cl_moe.strategies.joint import Joint
from cl_moe.strategies.lifelong_moe import LifelongMoE
from cl_moe.strategies.lwf import LwF
from cl_moe.strategies.naive import Naive
from cl_moe.strategies.replay import Replay

__all__ = [
    "Cumulative",
    "DistillFrom",
    "Joint",
    "LifelongMoE",
    "LwF",
    "Naive",
    "Outlook",
    "Replay",
    "Step",
    "Strategy",
]
