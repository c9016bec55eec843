"""Floating-point operations: counted where they are computed, and charged to who asked for them."""

from cl_moe.counting.charges import Charges
from cl_moe.counting.operations import CountFlops

__all__ = ["Charges", "CountFlops"]
