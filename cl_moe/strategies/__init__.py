"""What resists forgetting in data, loss or gradient. One file per strategy; they compose as a list."""

from cl_moe.strategies.agem import AGEM
from cl_moe.strategies.base import Outlook, Setting, Step, Strategy
from cl_moe.strategies.bic import BiC
from cl_moe.strategies.continual_backprop import ContinualBackprop
from cl_moe.strategies.cumulative import Cumulative
from cl_moe.strategies.demix import DEMix
from cl_moe.strategies.der import DER
from cl_moe.strategies.distill_from import DistillFrom
from cl_moe.strategies.ewc import EWC
from cl_moe.strategies.gdumb import GDumb
from cl_moe.strategies.gem import GEM
from cl_moe.strategies.icarl import ICaRL
from cl_moe.strategies.joint import Joint
from cl_moe.strategies.l2p import L2P
from cl_moe.strategies.latent_replay import LatentReplay
from cl_moe.strategies.lifelong_moe import LifelongMoE
from cl_moe.strategies.locality import Locality
from cl_moe.strategies.lwf import LwF
from cl_moe.strategies.mas import MAS
from cl_moe.strategies.naive import Naive
from cl_moe.strategies.replay import Replay
from cl_moe.strategies.rewarming import Rewarming
from cl_moe.strategies.router_freezing import RouterFreezing
from cl_moe.strategies.router_replay import RouterReplay
from cl_moe.strategies.shrink_perturb import ShrinkPerturb
from cl_moe.strategies.si import SI
from cl_moe.strategies.sparse_memory import SparseMemory
from cl_moe.strategies.weight_aligning import WeightAligning

__all__ = [
    "AGEM",
    "DER",
    "EWC",
    "GEM",
    "L2P",
    "MAS",
    "SI",
    "BiC",
    "ContinualBackprop",
    "Cumulative",
    "DEMix",
    "DistillFrom",
    "GDumb",
    "ICaRL",
    "Joint",
    "LatentReplay",
    "LifelongMoE",
    "Locality",
    "LwF",
    "Naive",
    "Outlook",
    "Replay",
    "Rewarming",
    "RouterFreezing",
    "RouterReplay",
    "Setting",
    "ShrinkPerturb",
    "SparseMemory",
    "Step",
    "Strategy",
    "WeightAligning",
]
