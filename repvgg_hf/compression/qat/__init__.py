"""Quantization-aware training: a model that computes with quantized weights while its parameters train.

Imports from `runtime` and `compression.codebooks` only; `compression.api.prepare_qat` chooses the weights to start at.
Public: `QATConfig`, `QATCallback`, `update_codebooks`, `Distillation`.
"""

from .callback import QATCallback, update_codebooks
from .config import QATConfig
from .distillation import Distillation

__all__ = ["Distillation", "QATCallback", "QATConfig", "update_codebooks"]
