"""Many runs side by side: the command ``cl-moe-compare``, and the same as a function."""

from __future__ import annotations

from cl_moe.tracking.compare.command import main
from cl_moe.tracking.compare.whole import Result, compare

__all__ = ["Result", "compare", "main"]
