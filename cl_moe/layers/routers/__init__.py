"""Who chooses: routers that score every expert by a linear map. They own no parameter (see ``base``)."""

from cl_moe.layers.routers.base import Candidates, Router
from cl_moe.layers.routers.capacity import Capacity
from cl_moe.layers.routers.expert_choice import ExpertChoice
from cl_moe.layers.routers.gshard import GShard
from cl_moe.layers.routers.scores import Scores
from cl_moe.layers.routers.switch import Switch
from cl_moe.layers.routers.top_k import TopK

__all__ = ["Candidates", "Capacity", "ExpertChoice", "GShard", "Router", "Scores", "Switch", "TopK"]
