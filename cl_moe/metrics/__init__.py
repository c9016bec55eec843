"""Measures of a run: formulas in ``functional`` (torch only), shells that fold batches beside it.

The shells are imported on first use, so that the formulas stay importable with torch alone.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cl_moe.metrics.calibration import CalibrationErrors
    from cl_moe.metrics.loads import ExpertLoads
    from cl_moe.metrics.peaks import PeakLoads
    from cl_moe.metrics.scores import ExperienceScores
    from cl_moe.metrics.tally import Tally

__all__ = ["CalibrationErrors", "ExperienceScores", "ExpertLoads", "PeakLoads", "Tally"]

_SHELLS = {
    "CalibrationErrors": "calibration",
    "ExperienceScores": "scores",
    "ExpertLoads": "loads",
    "PeakLoads": "peaks",
    "Tally": "tally",
}


def __getattr__(name: str) -> Any:
    if name not in _SHELLS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_SHELLS[name]}"), name)
