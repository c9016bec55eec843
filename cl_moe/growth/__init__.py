"""When experts are born and when they stop: decisions, and the one function that carries them out."""

from cl_moe.growth.census import Census, LayerCensus
from cl_moe.growth.freezing import AllPast, FreezePolicy, NeverFreeze, PastExperts, PastExpertsAndRouter
from cl_moe.growth.schedules import At, EveryExperience, GrowthSchedule, NeverGrow

__all__ = [
    "AllPast",
    "At",
    "Census",
    "EveryExperience",
    "FreezePolicy",
    "GrowthSchedule",
    "LayerCensus",
    "NeverFreeze",
    "NeverGrow",
    "PastExperts",
    "PastExpertsAndRouter",
]
