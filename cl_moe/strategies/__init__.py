"""What resists forgetting in data, loss or gradient. One file per strategy; they compose as a list."""

from cl_moe.strategies.agem import AGEM
from cl_moe.strategies.base import Outlook, Setting, Step, Strategy
from cl_moe.strategies.cumulative import Cumulative
from cl_moe.strategies.der import DER
from cl_moe.strategies.distill_from import DistillFrom
from cl_moe.strategies.ewc import EWC
from cl_moe.strategies.gdumb import GDumb
from cl_moe.strategies.gem import GEM
from cl_moe.strategies.icarl import ICaRL
from cl_moe.strategies.joint import Joint
from cl_moe.strategies.lifelong_moe import LifelongMoE
from cl_moe.strategies.lwf import LwF
from cl_moe.strategies.mas import MAS
from cl_moe.strategies.naive import Naive
from cl_moe.strategies.replay import Replay
from cl_moe.strategies.router_freezing import RouterFreezing
from cl_moe.strategies.si import SI
from cl_moe.strategies.sparse_memory import SparseMemory

__all__ = [
    "AGEM",
    "DER",
    "EWC",
    "GEM",
    "MAS",
    "SI",
    "Cumulative",
    "DistillFrom",
    "GDumb",
    "ICaRL",
    "Joint",
    "LifelongMoE",
    "LwF",
    "Naive",
    "Outlook",
    "Replay",
    "RouterFreezing",
    "Setting",
    "SparseMemory",
    "Step",
    "Strategy",
]
