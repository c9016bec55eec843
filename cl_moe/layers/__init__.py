"""Expert layers, usable with torch alone: ``layer(x) -> (out, Routing)``, ``grow``, ``freeze``."""

from cl_moe.layers.dense import DenseFFN
from cl_moe.layers.depth import DepthRouter, MixtureOfDepths
from cl_moe.layers.expert_layer import ExpertLayer
from cl_moe.layers.experts import Cohort, ExpertPool
from cl_moe.layers.moe import MoE
from cl_moe.layers.peer import PEER
from cl_moe.layers.pkm import PKM
from cl_moe.layers.retrieval import Retrieval
from cl_moe.layers.router_parts import router_names
from cl_moe.layers.routers import (
    Candidates,
    Capacity,
    ExpertChoice,
    GShard,
    Router,
    Scores,
    Switch,
    TopK,
)
from cl_moe.layers.routing import ExpertLoad, Routing, fold_load
from cl_moe.layers.step_loads import StepLoads
from cl_moe.layers.tokens import Tokens

__all__ = [
    "PEER",
    "PKM",
    "Candidates",
    "Capacity",
    "Cohort",
    "DenseFFN",
    "DepthRouter",
    "ExpertChoice",
    "ExpertLayer",
    "ExpertLoad",
    "ExpertPool",
    "GShard",
    "MixtureOfDepths",
    "MoE",
    "Retrieval",
    "Router",
    "Routing",
    "Scores",
    "StepLoads",
    "Switch",
    "Tokens",
    "TopK",
    "fold_load",
    "router_names",
]
