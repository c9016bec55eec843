"""Expert layers, usable with torch alone: ``layer(x) -> (out, Routing)``, ``grow``, ``freeze``."""

from cl_moe.layers.dense import DenseFFN
from cl_moe.layers.experts import Cohort, ExpertPool
from cl_moe.layers.moe import MoE
from cl_moe.layers.peer import PEER
from cl_moe.layers.routers import Candidates, Router, Switch, TopK
from cl_moe.layers.routing import ExpertLayer, ExpertLoad, Routing, Tokens, fold_load

__all__ = [
    "PEER",
    "Candidates",
    "Cohort",
    "DenseFFN",
    "ExpertLayer",
    "ExpertLoad",
    "ExpertPool",
    "MoE",
    "Router",
    "Routing",
    "Switch",
    "Tokens",
    "TopK",
    "fold_load",
]
