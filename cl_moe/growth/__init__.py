"""When experts are born and when they stop: decisions, and the one function that carries them out."""

from cl_moe.growth.budget import GrowthBudget
from cl_moe.growth.census import Census, LayerCensus
from cl_moe.growth.freezing import (
    Aged,
    AllPast,
    FreezePolicy,
    Idle,
    NeverFreeze,
    PastExperts,
    PastExpertsAndRouter,
)
from cl_moe.growth.pruning import NeverPrune, PruneIdle, PrunePolicy, RecycleDead
from cl_moe.growth.schedules import At, Decision, EveryExperience, EveryK, GrowthSchedule, NeverGrow
from cl_moe.growth.trace import Looks, Trace
from cl_moe.growth.triggers import OnDrift, OnPlateau, OnSaturation

__all__ = [
    "Aged",
    "AllPast",
    "At",
    "Census",
    "Decision",
    "EveryExperience",
    "EveryK",
    "FreezePolicy",
    "GrowthBudget",
    "GrowthSchedule",
    "Idle",
    "LayerCensus",
    "Looks",
    "NeverFreeze",
    "NeverGrow",
    "NeverPrune",
    "OnDrift",
    "OnPlateau",
    "OnSaturation",
    "PastExperts",
    "PastExpertsAndRouter",
    "PruneIdle",
    "PrunePolicy",
    "RecycleDead",
    "Trace",
]
