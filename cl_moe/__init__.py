"""cl-moe: continual learning with growing experts. Importing this package imports nothing heavy."""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from cl_moe.loading import load_model as load_model
else:

    def __getattr__(name: str) -> object:
        """``load_model``: it brings the whole platform, so it is imported when it is asked for."""
        if name != "load_model":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from cl_moe.loading import load_model

        return load_model
