"""Making a quantized model: `api.py` has the entry points, and reads top to bottom.

`codebooks/` turns one tensor into codes, codebook and scale; `ptq/` quantizes a model with calibration data; `qat/`
trains one with quantized weights; `methods.py` says what each method does. May import runtime/ and networks/.
"""

from . import methods  # noqa: F401  registers what the methods do
from .api import dequantize, prepare_qat, quantize
from .ptq.config import CalibrationConfig
from .qat.callback import QATCallback, update_codebooks, warn_of_unmoved_codebooks
from .qat.config import QATConfig
from .qat.distillation import Distillation
from .qat.prepare import restore_qat, settle_qat
from .saved_modules import load_quantized, save_quantized

__all__ = [
    "CalibrationConfig",
    "Distillation",
    "QATCallback",
    "QATConfig",
    "dequantize",
    "load_quantized",
    "prepare_qat",
    "quantize",
    "restore_qat",
    "save_quantized",
    "settle_qat",
    "update_codebooks",
    "warn_of_unmoved_codebooks",
]
