"""Making a quantised model: clustering, post-training quantisation, quantisation-aware training."""

from .clustering import assign, kmeans_1d
from .fake_quantize import ClusterFakeQuantize
from .ptq import quantize_model
from .qat import QATCallback, prepare_qat, restore_qat, update_codebooks

__all__ = [
    "ClusterFakeQuantize",
    "QATCallback",
    "assign",
    "kmeans_1d",
    "prepare_qat",
    "quantize_model",
    "restore_qat",
    "update_codebooks",
]
