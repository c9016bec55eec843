"""Bodies whose feed-forward slots take any expert layer."""

from cl_moe.models.base import ContinualModel, Head
from cl_moe.models.decoder import DecoderLM
from cl_moe.models.mlp import MLPClassifier

__all__ = ["ContinualModel", "DecoderLM", "Head", "MLPClassifier"]
