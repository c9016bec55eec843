"""Bodies whose feed-forward slots take any expert layer."""

from cl_moe.models.base import ContinualModel, Head
from cl_moe.models.decoder import DecoderLM
from cl_moe.models.encoder import EncoderLM
from cl_moe.models.hugging_face import HuggingFaceLM
from cl_moe.models.mlp import MLPClassifier
from cl_moe.models.patch_transformer import PatchTransformer
from cl_moe.models.regressor import Regressor
from cl_moe.models.text_classifier import DecoderClassifier, EncoderClassifier

__all__ = [
    "ContinualModel",
    "DecoderClassifier",
    "DecoderLM",
    "EncoderClassifier",
    "EncoderLM",
    "Head",
    "HuggingFaceLM",
    "MLPClassifier",
    "PatchTransformer",
    "Regressor",
]
