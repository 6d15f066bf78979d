"""Making a quantized model: clustering, post-training quantization, quantization-aware training."""

from .codebooks.kmeans import assign, kmeans_1d
from .qat.fake_quantize import ClusterFakeQuantize
from .api import quantize_model
from .qat.prepare import QATCallback, prepare_qat, restore_qat, update_codebooks

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
