"""Measures of a run: formulas in ``functional`` (torch only), shells in ``scores`` and ``loads``.

The shells are imported on first use, so that the formulas stay importable with torch alone.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cl_moe.metrics.loads import ExpertLoads
    from cl_moe.metrics.scores import ExperienceScores

__all__ = ["ExperienceScores", "ExpertLoads"]

_SHELLS = {"ExperienceScores": "scores", "ExpertLoads": "loads"}


def __getattr__(name: str) -> Any:
    if name not in _SHELLS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_SHELLS[name]}"), name)
